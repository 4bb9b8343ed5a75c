# SPDX-License-Identifier: Apache-2.0
"""Decoder blocks that call their layers directly: the bits of vLLM's own way through the modules, or that way."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from tests.calibration.running import quantize
from tests.families import write_model
from tests.loading import engine_config, loaded_model
from vllm_w4a4_plugin.quantization import direct
from vllm_w4a4_plugin.quantization.direct import READ, DirectBlock, call_directly, fingerprint
from vllm_w4a4_plugin.quantization.silu import register_silu
from vllm_w4a4_plugin.quantization.steps import BLOCKS, MODELS

HIDDEN = 128


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    directory = tmp_path_factory.mktemp("direct")
    calibration = torch.randint(3, 512, (2, 32), generator=torch.Generator().manual_seed(5))
    return quantize(
        write_model(request.param, directory / "float"), directory / "quantized", calibration, "all-w4a4", distill=0
    )


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    register_silu()  # as an engine does
    with loaded_model(checkpoint, dtype=request.param) as model:
        yield model


@pytest.fixture
def block(model: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The first block, with an attention that needs no engine around it, and the kernels that an engine sets."""
    block = model.model.layers[0]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        groups = query.shape[-1] // key.shape[-1]
        return query - 2 * key.repeat(1, groups) + value.repeat(1, groups)

    monkeypatch.setattr(block.self_attn.attn, "forward", attend)
    if not hasattr(torch.ops._C, "rotary_embedding"):  # with another vLLM, see tests/other_vllm.py
        monkeypatch.setattr(
            block.self_attn.rotary_emb,
            "_forward_method",
            lambda positions, query, key: (query * (1 + positions[:, None]), key - positions[:, None]),
        )
    config = engine_config(checkpoint)
    call_directly(block, config)
    with config.kernel_config.ir_op_priority.set_priority():
        yield block


def inputs(tokens: int, block: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x, residual = torch.randn(2, tokens, HIDDEN, generator=generator).to(block.input_layernorm.weight.dtype)
    return torch.randint(0, 400, (tokens,), generator=generator), x, residual


def through_modules(block: Any, *arguments: Any) -> Any:
    return type(block).forward(block, *arguments)


@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
@pytest.mark.parametrize("is_first", [True, False])
@torch.inference_mode()
def test_the_bits_are_those_of_the_modules(block: Any, tokens: int, is_first: bool) -> None:
    positions, x, residual = inputs(tokens, block)
    called: list[str] = []
    expected = through_modules(block, positions, x.clone(), None if is_first else residual.clone())
    for name in ("mlp", "self_attn"):
        block.get_submodule(name)._call_impl = lambda *_, name=name: called.append(name)
    try:
        assert isinstance(block.forward, DirectBlock)
        found = block(positions, x.clone(), None if is_first else residual.clone())
    finally:
        for name in ("mlp", "self_attn"):
            del block.get_submodule(name)._call_impl
    assert not called
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.shape == (tokens, HIDDEN)


@pytest.mark.parametrize("name", ["self_attn.qkv_proj", "mlp", "post_attention_layernorm"])
@torch.inference_mode()
def test_hooks_are_called(block: Any, name: str) -> None:
    arguments = inputs(3, block)
    expected = block(*(argument.clone() for argument in arguments))
    seen: list[str] = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        hook = getattr(block.get_submodule(name), register)(lambda *_: seen.append(name))
        try:
            found = block(*(argument.clone() for argument in arguments))
        finally:
            hook.remove()
        assert seen == [name]
        seen.clear()
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    block(*arguments)
    assert not seen


@torch.inference_mode()
def test_weights_are_read_at_each_call(block: Any) -> None:
    arguments = inputs(3, block)
    before = block(*(argument.clone() for argument in arguments))[0]
    modules = [module for module in block.modules() if "weight" in module._parameters]
    former = [module._parameters["weight"] for module in modules]
    for module, weight in zip(modules, former, strict=True):
        if weight.is_floating_point():
            module._parameters["weight"] = torch.nn.Parameter(weight * 1.5, requires_grad=False)
        else:
            module._parameters["weight"] = torch.nn.Parameter(weight.flip(0), requires_grad=False)
    try:
        found = block(*(argument.clone() for argument in arguments))[0]
        expected = through_modules(block, *(argument.clone() for argument in arguments))[0]
    finally:
        for module, weight in zip(modules, former, strict=True):
            module._parameters["weight"] = weight
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)


def test_a_block_with_other_code_is_called_as_it_is(
    block: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (block, block.self_attn, block.mlp):
        forward = type(part).forward
        del block.forward
        monkeypatch.setitem(READ, forward.__qualname__, {"0" * 32})
        direct.was_read.cache_clear()
        try:
            call_directly(block, engine_config(checkpoint))
            assert not isinstance(block.forward, DirectBlock)
        finally:
            monkeypatch.undo()
            direct.was_read.cache_clear()
            call_directly(block, engine_config(checkpoint))
        assert isinstance(block.forward, DirectBlock)


@pytest.mark.parametrize("name", [name for block, parts in BLOCKS.items() for name in (block, *parts)])
def test_the_code_of_this_vllm_was_read(name: str) -> None:
    """If this fails with a new vLLM, read what changed, take it over into `DirectBlock`, and add the fingerprint."""
    module, _, class_name = name.rpartition(".")
    forward = getattr(import_module(f"{MODELS}{module}"), class_name).forward
    assert fingerprint(forward) in READ[f"{class_name}.forward"]


def test_the_rotation_of_this_vllm_was_read() -> None:
    assert fingerprint(RotaryEmbedding.forward_cpu) in READ["RotaryEmbedding.forward_cpu"]


def test_a_fingerprint_is_of_code_only(tmp_path: Path) -> None:
    sources = [
        "def f(x):\n    return x + 1\n",
        "def f(x):\n\n    # one more\n    return (\n        x + 1\n    )\n",
        "def f( x ):\n        return x+1\n",
        "def f(x):\n    return x + 2\n",
    ]
    found = []
    for i, source in enumerate(sources):
        (tmp_path / f"source_{i}.py").write_text(source)
        namespace: dict[str, Any] = {}
        exec(compile(source, str(tmp_path / f"source_{i}.py"), "exec"), namespace)
        found.append(fingerprint(namespace["f"]))
    assert found[2] == found[0]
    assert found[3] != found[0]
    assert len(set(found)) == 3  # parentheses are code
