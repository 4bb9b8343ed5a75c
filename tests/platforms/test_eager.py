# SPDX-License-Identifier: Apache-2.0
"""When models run without torch.compile, and vLLM's kernels that stand in for it against their formulas."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import ir
from vllm.config import CompilationMode, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform

from tests.conftest import MICRO
from tests.loading import engine_config
from vllm_w4a4_plugin.constants import PROVIDER
from vllm_w4a4_plugin.platforms import eager

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Relative to the largest value: in bfloat16 one rounding of the result."""


def mode(**arguments: Any) -> CompilationMode:
    return engine_config(MICRO, **{"enforce_eager": False, **arguments}).compilation_config.mode


def test_quantized_models_are_not_compiled_by_default() -> None:
    assert mode() == CompilationMode.NONE
    assert mode(quantization=None) == CompilationMode.NONE


@pytest.mark.parametrize("asked", [{"compilation_config": {"mode": 3}}, {"optimization_level": 1}])
def test_who_asks_for_compilation_gets_it(asked: dict[str, Any]) -> None:
    assert mode(**asked) == CompilationMode.DYNAMO_TRACE_ONCE  # what vLLM makes of any on CPUs


@pytest.fixture
def unquantized(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text((MICRO / "config.json").read_text())
    return tmp_path


def test_other_models_are_left_alone(unquantized: Path) -> None:
    config = engine_config(unquantized, quantization=None, enforce_eager=False)
    assert config.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE
    config = engine_config(unquantized, quantization=None)
    assert PROVIDER not in config.kernel_config.ir_op_priority.rms_norm
    with set_current_vllm_config(config):
        x = torch.randn(5, 64)
        assert torch.equal(SiluAndMul()(x), SiluAndMul.forward_native(x))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def layers(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    config = engine_config(MICRO)
    priority = config.kernel_config.ir_op_priority
    assert priority.rms_norm[0] == priority.fused_add_rms_norm[0] == PROVIDER
    default = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    try:
        with set_current_vllm_config(config), priority.set_priority():
            yield request.param
    finally:
        torch.set_default_dtype(default)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[found.dtype]


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_norms(layers: torch.dtype, tokens: int) -> None:
    norm = RMSNorm(192, eps=1e-5)
    norm.weight.data = torch.rand(192).to(layers)
    x, residual = torch.randn(2, tokens, 192, dtype=layers)
    weight = norm.weight.double()

    def formula(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    assert_close(norm(x), formula(x.double()))
    # Heads: part of the columns of a wider tensor.
    wide = torch.randn(tokens, 3 * 192 + 64, dtype=layers)
    heads = wide[:, 64:].view(tokens, 3, 192)
    assert_close(norm(heads), formula(heads.double()))
    total = (x.double() + residual.double()).to(layers)
    found, new_residual = norm(x.clone(), residual.clone())
    assert torch.equal(new_residual, total)
    assert_close(found, formula(total.double()))


def test_what_the_kernel_does_not_support_takes_another(layers: torch.dtype) -> None:
    other = torch.float32 if layers is torch.bfloat16 else torch.bfloat16
    x = torch.randn(4, 192, dtype=layers)
    dispatch = ir.ops.rms_norm.dispatch
    assert dispatch(x, torch.ones(192, dtype=layers), 1e-5, None).provider == PROVIDER
    weight = torch.ones(192, dtype=layers)
    for unsupported, variance_size in ((weight.to(other), None), (None, None), (weight, 96)):
        assert dispatch(x, unsupported, 1e-5, variance_size).provider == "native"


def test_silu_and_mul(layers: torch.dtype) -> None:
    layer = SiluAndMul()
    assert type(layer) is not SiluAndMul
    x = torch.randn(5, 2 * 96, dtype=layers)
    gate, up = x.double().chunk(2, dim=-1)
    assert_close(layer(x), gate * torch.sigmoid(gate) * up)


def test_a_platform_without_the_kernels_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "OPERATORS", ("no_such_kernel",))
    assert current_platform.is_cpu()
    assert mode() == CompilationMode.DYNAMO_TRACE_ONCE


def test_attention_is_an_operator_of_torchs_only_where_something_may_be_compiled(unquantized: Path) -> None:
    compiled = engine_config(MICRO, enforce_eager=False, optimization_level=3)
    other = engine_config(unquantized, quantization=None)
    for config, is_operator in ((engine_config(MICRO), False), (compiled, True), (other, True)):
        with set_current_vllm_config(config):
            assert current_platform.opaque_attention_op() is is_operator
    assert current_platform.opaque_attention_op()
