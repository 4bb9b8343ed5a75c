# SPDX-License-Identifier: Apache-2.0
"""Norms and SiLU that wait for the linear layer behind them: where they do, and that it computes the same."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import RowParallelLinear

from benchmarks import random_model
from benchmarks.shapes import Model
from tests.conftest import MICRO
from tests.linears import load
from tests.loading import engine_config, loaded_model
from tests.quantization.linears import IN, Linear, column_layer, inputs
from vllm_w4a4_plugin.ops import reference
from vllm_w4a4_plugin.quantization import report
from vllm_w4a4_plugin.quantization.silu import register_silu
from vllm_w4a4_plugin.quantization.steps import (
    BLOCKS,
    MODELS,
    Activated,
    Normed,
    WaitingNorm,
    WaitingSilu,
    fuse_steps,
)

FLATQUANT = "W4A4_FLATQUANT_DYNAMIC"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks with every linear layer in W4A4."""
    directory = tmp_path_factory.mktemp("steps") / "all-w4a4"
    shape = Model("tiny", hidden=192, intermediate=384, heads=4, kv_heads=2, head_dim=64, vocabulary=512)
    random_model.make(directory, shape, 2, "all-w4a4")
    return directory


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    register_silu()  # as an engine does
    with loaded_model(checkpoint, dtype=request.param) as model:
        yield model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_a_norm_is_computed_by_the_linear_behind_it(model: Any) -> None:
    for block in model.model.layers:
        for norm, linear in (
            (block.input_layernorm, block.self_attn.qkv_proj),
            (block.post_attention_layernorm, block.mlp.gate_up_proj),
        ):
            assert type(norm) is WaitingNorm
            dtype = norm.weight.dtype
            x, residual = torch.randn(2, 5, 192).to(dtype)
            total = x.double() + residual.double()
            expected = total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
            updated = residual.clone()
            waiting, same = norm(x, updated)
            assert isinstance(waiting, Normed)
            assert same is updated
            assert torch.equal(updated, residual)
            found = linear(waiting)[0]
            assert torch.equal(updated, total.to(dtype))
            assert torch.equal(found, linear(norm(x, residual.clone())[0].tensor())[0])
            # Another rounding of the norm may flip an int4 activation.
            assert relative(found, linear(expected.to(dtype))[0]) < 0.02
            first = norm(x)
            assert torch.equal(linear(first)[0], linear(first.tensor())[0])


def test_silu_is_computed_by_the_linear_behind_it(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    assert type(mlp.act_fn) is WaitingSilu
    x = torch.randn(5, 2 * 384).to(mlp.gate_up_proj.params_dtype)
    waiting = mlp.act_fn(x)
    assert isinstance(waiting, Activated)
    found = mlp.down_proj(waiting)[0]
    assert torch.equal(found, mlp.down_proj(waiting.tensor())[0])
    gate, up = x.double().chunk(2, -1)
    assert relative(found, mlp.down_proj((gate * gate.sigmoid() * up).to(x.dtype))[0]) < 0.02
    # A whole MLP, whose parts vLLM connects.
    hidden = torch.randn(5, 192).to(x.dtype)
    gate_up = mlp.gate_up_proj(hidden)[0]
    assert torch.equal(mlp(hidden), mlp.down_proj(Activated(gate_up).tensor())[0])


def test_other_norms_are_left_alone(model: Any) -> None:
    norms = [model.model.norm, *(block.self_attn.q_norm for block in model.model.layers)]
    assert {type(norm) for norm in norms} == {RMSNorm}


def test_what_the_operator_does_not_take_is_a_tensor(model: Any) -> None:
    norm = model.model.layers[0].input_layernorm
    wide = torch.randn(5, 2 * 192).to(norm.weight.dtype)
    assert isinstance(norm(wide[:, :192]), torch.Tensor)
    other = torch.float32 if norm.weight.dtype is torch.bfloat16 else torch.bfloat16
    assert isinstance(norm(torch.randn(5, 192, dtype=other)), torch.Tensor)


def test_the_start_up_table_names_the_operators(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_silu()
    logged: list[str] = []
    monkeypatch.setattr(report.logger, "info", lambda text, *args: logged.append(text % args))
    with loaded_model(checkpoint):
        (table,) = (line for line in logged if "layers of this model" in line)
    for operator, layers in (("norm_flatquant_linear", 4), ("flatquant_linear", 2), ("silu_flatquant_linear", 2)):
        assert f"{FLATQUANT}  {layers} " in next(line for line in table.splitlines() if f"::{operator}," in line)


@pytest.mark.parametrize("asked", [{"enforce_eager": False, "optimization_level": 3}, {"enable_lora": True}])
def test_not_with_torch_compile_or_lora(asked: dict[str, Any], model: Any) -> None:
    config = engine_config(MICRO, **asked)
    block = model.model.layers[0]
    former = block.input_layernorm.__class__
    block.input_layernorm.__class__ = RMSNorm
    try:
        fuse_steps(model, config)
        assert type(block.input_layernorm) is RMSNorm
        fuse_steps(model, engine_config(MICRO))
        assert type(block.input_layernorm) is WaitingNorm
    finally:
        block.input_layernorm.__class__ = former


@pytest.mark.parametrize("part", ["", "self_attn", "mlp"])
def test_only_in_blocks_that_are_known(model: Any, part: str) -> None:
    """Eagle's blocks, for example, have vLLM's names, in other modules."""
    block = model.model.layers[0]
    changed = block.get_submodule(part)
    former = type(changed)
    block.input_layernorm.__class__ = RMSNorm
    try:
        changed.__class__ = type(former.__name__, (former,), {"__module__": "vllm.model_executor.models.llama_eagle3"})
        fuse_steps(model, engine_config(MICRO))
        assert type(block.input_layernorm) is RMSNorm
    finally:
        changed.__class__ = former
        block.input_layernorm.__class__ = WaitingNorm


@pytest.mark.parametrize("name", [name for block, parts in BLOCKS.items() for name in (block, *parts)])
def test_the_known_classes_exist(name: str) -> None:
    module, _, class_name = name.rpartition(".")
    assert isinstance(getattr(import_module(f"{MODELS}{module}"), class_name), type)


@pytest.mark.usefixtures("vllm_context")
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks(make_config: Any, at_rank: Any, rank: int) -> None:
    """Column-parallel layers have whole tokens on every rank; of a row-parallel one's, ranks have parts."""
    linear = Linear(32, FLATQUANT, 0)
    config = make_config(proj=linear)
    at_rank(rank, 2)
    column = load(column_layer(config, 32), {None: linear})
    assert column.quant_method.begin_with(Normed.operator)
    weight = torch.rand(IN) + 0.5
    x = inputs()
    found = column(Normed(x, None, weight, 1e-5))[0]
    normed = reference.rms_norm(x, None, weight, 1e-5)
    assert relative(found, linear.expected(normed)[:, 16 * rank :][:, :16]) < 0.02
    row = RowParallelLinear(IN, 32, bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.proj")
    assert not row.quant_method.begin_with(Activated.operator)


@pytest.mark.usefixtures("vllm_context")
@pytest.mark.parametrize("kind", ["W4A4_DYNAMIC", "W8A8_DYNAMIC"])
def test_other_types_get_tensors(make_config: Any, at_rank: Any, kind: str) -> None:
    layer = column_layer(make_config(proj=Linear(16, kind, 0)), 16)
    assert not layer.quant_method.begin_with(Normed.operator)
