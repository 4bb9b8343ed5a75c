# SPDX-License-Identifier: Apache-2.0
"""The self check of the CPU kernels."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vllm_w4a4_plugin.ops import api, cpu, self_check


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    self_check._require_working_kernels.cache_clear()
    yield
    self_check._require_working_kernels.cache_clear()


def break_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = api.flatquant_linear

    def transposed(x: Any, weight: Any, scale: Any, left: torch.Tensor, *others: Any) -> torch.Tensor:
        return kernel(x, weight, scale, left.t().contiguous(), *others)

    monkeypatch.setattr(api, "flatquant_linear", transposed)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_working_kernels_pass(dtype: torch.dtype, weight_bits: int, experts: bool) -> None:
    self_check.require_working_kernels(dtype, weight_bits, experts)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_the_models_dtype_may_be_the_default(weight_bits: int, experts: bool) -> None:
    """As it is while vLLM makes a model."""
    with self_check.default_dtype(torch.bfloat16):
        self_check.require_working_kernels(torch.bfloat16, weight_bits, experts)
        assert torch.get_default_dtype() == torch.bfloat16


def test_wrong_int8_results_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that saturate at 16 bits, as those of some CPUs' instructions do."""

    def saturating(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return kernel(x, packed, scale, bias).clamp(-200, 200)

    kernel = api.w8a8_linear
    monkeypatch.setattr(api, "w8a8_linear", saturating)
    with pytest.raises(RuntimeError, match="The int8 kernels for"):
        self_check.require_working_kernels(torch.bfloat16, 8)


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_wrong_results_of_experts_are_an_error(monkeypatch: pytest.MonkeyPatch, weight_bits: int) -> None:
    """Up before gate."""

    def swapped(x: Any, weights: Any, ids: Any, packed: Any, scale: torch.Tensor, *others: Any) -> torch.Tensor:
        return kernel(x, weights, ids, packed, scale.roll(scale.shape[1] // 2, 1), *others)

    kernel = api.experts_mlp
    monkeypatch.setattr(api, "experts_mlp", swapped)
    with pytest.raises(RuntimeError, match=f"The int{weight_bits} kernels of experts for"):
        self_check.require_working_kernels(torch.float32, weight_bits, experts=True)


def test_wrong_results_are_an_error_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel(monkeypatch)
    with pytest.raises(RuntimeError) as error:
        self_check.require_working_kernels(torch.bfloat16)
    assert f"The int4 kernels for {cpu.cpu_instruction_set()} compute wrong results on this CPU" in str(error.value)
    assert "VLLM_W4A4_ISA" in str(error.value)


def test_nan_is_wrong_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "flatquant_linear", lambda x, *others: torch.full((x.shape[0], 40), torch.nan))
    with pytest.raises(RuntimeError, match="relative error nan"):
        self_check.require_working_kernels(torch.float32)


def test_it_can_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel(monkeypatch)
    monkeypatch.setenv("VLLM_W4A4_SELF_CHECK", "0")
    self_check.require_working_kernels(torch.bfloat16)
