# SPDX-License-Identifier: Apache-2.0
"""The self check at start-up: a kernel that is wrong or raises is not used, and the table says so."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu

from tests.linears import relative_error
from tests.npu.fused_library import Faults, fused_library
from tests.npu.linears import DYNAMIC, OTHER_ROUNDINGS, SAME_ROUNDINGS, Linear, inputs, open_config, output
from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.ops.npu import cann, fused, self_check
from vllm_w4a4_plugin.ops.npu.select import Kernel
from vllm_w4a4_plugin.ops.npu.self_check import Variant, fault_of
from vllm_w4a4_plugin.ops.npu.trial import expected_quantization

pytestmark = pytest.mark.usefixtures("config")

CPU = torch.device("cpu")
VARIANTS = [
    Variant(kernel, dtype, left, right, bias)
    for dtype in (torch.bfloat16, torch.float16)
    for bias in (False, True)
    for kernel, left, right in (
        (Kernel.FUSED, True, True),
        (Kernel.FUSED, True, False),
        (Kernel.FUSED, False, False),
        (Kernel.KRONECKER, True, True),
        (Kernel.UNFUSED, True, False),
        (Kernel.UNTRANSFORMED, False, False),
    )
]


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """As in a process that has checked nothing."""
    self_check._fault_of.cache_clear()
    yield
    self_check._fault_of.cache_clear()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The fused library, loaded."""
    monkeypatch.setattr(fused, "unavailable_reason", lambda: "")
    with fused_library() as faults:
        yield faults


def break_kronecker(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = torch_npu.npu_kronecker_quant

    def transposed(x: torch.Tensor, p1: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return operator(x, p1.t().contiguous(), *args, **kwargs)

    monkeypatch.setattr(torch_npu, "npu_kronecker_quant", transposed)


def refuse_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = torch_npu.npu_quant_matmul

    def call(*args: Any, bias: Any, **kwargs: Any) -> Any:
        if bias is not None:
            raise RuntimeError("aclnnQuantMatmulV5: bias is not supported\n[TRACEBACK]")
        return operator(*args, **kwargs)

    monkeypatch.setattr(torch_npu, "npu_quant_matmul", call)


def row(layer: Any) -> str:
    """The layer's line of the start-up table."""
    (line,) = layer.quant_config.report.table().splitlines()[2:]
    return line


def test_all_kernels_pass(library: Faults) -> None:
    assert library == Faults()
    assert [fault_of(variant, CPU) for variant in VARIANTS] == [""] * len(VARIANTS)


def test_clipping_is_part_of_it() -> None:
    variant = Variant(Kernel.KRONECKER, torch.bfloat16, True, True)
    q = expected_quantization(variant.kernel, self_check.self_check_operands(variant, 17)).q
    assert (q == -8).float().mean() > 0.05


@pytest.mark.parametrize(
    ("fault", "text"),
    [("swaps", "computes "), ("transposes", "computes "), ("raises", "raises RuntimeError: aclrtLaunchKernel failed")],
)
def test_a_fused_library_that_fails_gives_way_to_cann(
    library: Faults, column: Callable[..., Any], fault: str, text: str
) -> None:
    setattr(library, fault, True)
    linear, x = Linear(48, 192), inputs(192)
    layer = column(linear)
    assert relative_error(output(layer, x), linear.expected(x)) < SAME_ROUNDINGS
    assert layer.quant_method.scheme.operator == Kernel.KRONECKER
    assert f"up: self check: {Kernel.FUSED} {text}" in row(layer)
    assert "more of the same" not in row(layer)


def test_a_wrong_kronecker_quant_gives_way_to_products(
    column: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_kronecker(monkeypatch)
    linear, x = Linear(48, 192), inputs(192)
    layer = column(linear)
    assert relative_error(output(layer, x), linear.expected(x, with_npu_roundings=False)) < OTHER_ROUNDINGS
    assert layer.quant_method.scheme.operator == Kernel.UNFUSED
    assert f"up: self check: {Kernel.KRONECKER} computes " in row(layer)


def test_a_refused_bias_leaves_only_layers_with_one_to_vllm_ascend(
    column: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm_ascend.ops.linear import AscendColumnParallelLinear

    refuse_bias(monkeypatch)
    assert column(Linear(48, 192, bias=False)).quant_method.scheme.operator == Kernel.KRONECKER
    layer = AscendColumnParallelLinear(
        192,
        48,
        bias=True,
        quant_config=open_config(tmp_path, {"mlp.up": Linear(48, 192, bias=True)}),
        prefix="model.layers.0.mlp.up",
        params_dtype=torch.bfloat16,
    )
    theirs = "AscendW4A4FlatQuantDynamicLinearMethod"
    assert type(layer.quant_method.quant_method).__name__ == theirs
    assert "raises RuntimeError: aclnnQuantMatmulV5: bias is not supported. It runs in" in caplog.text
    assert f"vllm-ascend {theirs}" in row(layer)
    assert f"model.layers.0.mlp.up: self check: {Kernel.KRONECKER} raises" in row(layer)


def test_what_vllm_ascend_cannot_run_is_an_error(column: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_bias(monkeypatch)
    with pytest.raises(CheckpointError) as error:
        column(Linear(48, 192, 12, None, bias=True))
    assert "layer model.layers.0.mlp.up: self check: matmul + npu_dynamic_quant + npu_quant_matmul raises" in str(
        error.value
    )
    assert "vllm-w4a4 doctor --device-check" in str(error.value)


def test_each_variant_is_checked_once(column: Callable[..., Any], calls: list[Any]) -> None:
    column(Linear(48, 192, kind=DYNAMIC))
    first = [name for name, _ in calls].count("npu_dynamic_quant")
    column(Linear(64, 192, kind=DYNAMIC))
    assert [name for name, _ in calls].count("npu_dynamic_quant") == first == len(self_check.TOKENS)


def test_it_can_be_skipped(column: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    break_kronecker(monkeypatch)
    monkeypatch.setenv("VLLM_W4A4_SELF_CHECK", "0")
    assert column(Linear(48, 192)).quant_method.scheme.operator == Kernel.KRONECKER


def test_nothing_is_computed_where_the_operators_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    break_kronecker(monkeypatch)
    assert fault_of(Variant(Kernel.KRONECKER, torch.bfloat16, True, True), torch.device("meta")) == ""
    assert cann.runs_on(torch.device("npu"))
    assert cann.runs_on(CPU)
