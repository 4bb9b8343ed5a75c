# SPDX-License-Identifier: Apache-2.0
"""The device check on the stand-in: it passes there, and each provoked fault ends in the line that names it."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu

from tests.npu.fused_library import Faults, fused_library
from tests.npu.loading import run_operators_on_cpu
from tests.npu.processes import MICRO
from vllm_w4a4_plugin.capacity.model import read_model
from vllm_w4a4_plugin.device_check import plan, report
from vllm_w4a4_plugin.device_check.environment import version_outcomes
from vllm_w4a4_plugin.device_check.layers import Session
from vllm_w4a4_plugin.device_check.plan import LayerOnRank, layers_on_rank, make_plan
from vllm_w4a4_plugin.device_check.steps import execute
from vllm_w4a4_plugin.ops.npu import fused
from vllm_w4a4_plugin.ops.npu.select import RankShape

run_operators_on_cpu()

Call = Callable[..., Any]


def layers() -> list[LayerOnRank]:
    """One layer of the micro checkpoint, and one with a left factor only, which CANN's operators compute in parts."""
    (first, *_) = layers_on_rank(read_model(MICRO), 1)
    left_only = RankShape(first.shape.quant_type, 64, 192, 1, 12, None)
    return [first, LayerOnRank("o_proj", left_only, 192, False)]


def check(*kinds: str, has_fused_library: bool = False) -> list[str]:
    """The lines of the steps of these kinds, or of all but those that take times."""
    session = Session(torch.device("cpu"), torch_npu.npu)
    steps = make_plan(layers(), has_fused_library)
    chosen = [step for step in steps if (step.kind in kinds if kinds else step.kind != "time")]
    assert chosen
    return [report.line(report.title_of(step), execute(step, session)) for step in chosen]


def failures(*kinds: str, **options: Any) -> list[str]:
    return [line for line in check(*kinds, **options) if line.startswith("FAILED")]


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Call], Call]], None]:
    """Replace an operator of torch_npu by what a function makes of it."""

    def replace(name: str, change: Callable[[Call], Call]) -> None:
        monkeypatch.setattr(torch_npu, name, change(getattr(torch_npu, name)))

    return replace


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The fused library, loaded."""
    monkeypatch.setattr(fused, "unavailable_reason", lambda: "")
    with fused_library() as faults:
        yield faults


def test_everything_passes(library: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CLASS_TOKENS", (1, 17, 129))
    lines = check(has_fused_library=True)
    assert [line for line in lines if not line.startswith("ok")] == []
    for text in ("[kronecker] q and scale", "[unfused] product", "[fused] with grid barrier", "[fused] captured graph"):
        assert any(text in line for line in lines), text


def swapped(words: torch.Tensor) -> torch.Tensor:
    """The two int4 values of each byte exchanged."""
    data = words.contiguous().view(torch.uint8)
    return ((data >> 4) | (data << 4)).view(torch.int32)


def test_wrong_nibble_order_of_weights(patch: Call) -> None:
    patch("npu_convert_weight_to_int4pack", lambda operator: lambda weight: swapped(operator(weight)))
    (line,) = failures("pack")
    assert "weight packing: the two int4 values of each byte are swapped: 8 of 8 inputs come out elsewhere" in line
    assert "are at 1 0 3 2 5 4 7 6 instead of 0 1 2 3" in line


def test_wrong_nibble_order_of_activations(patch: Call) -> None:
    def change(operator: Call) -> Call:
        def call(*args: Any, **kwargs: Any) -> Any:
            q, scale = operator(*args, **kwargs)
            return swapped(q), scale

        return call

    patch("npu_kronecker_quant", change)
    one_hot, *others = failures("layout", "quantize")
    assert "[kronecker] one-hot tokens: the two int4 values of each byte are swapped" in one_hot
    assert others
    assert all("the two int4 values of each byte are swapped" in line for line in others)


@pytest.mark.parametrize(("factor", "name"), [(1, "left_trans"), (2, "right_trans")])
def test_transposed_factor(patch: Call, factor: int, name: str) -> None:
    def change(operator: Call) -> Call:
        def call(*args: Any, **kwargs: Any) -> Any:
            changed = list(args)
            changed[factor] = changed[factor].t().contiguous()
            return operator(*changed, **kwargs)

        return call

    patch("npu_kronecker_quant", change)
    one_hot, *others = failures("layout", "quantize")
    assert f"{name} acts as its transpose" in one_hot
    assert others
    assert all(f"{name} acts as its transpose" in line for line in others)


def test_clip_rule_of_the_skipped_test(patch: Call) -> None:
    def change(operator: Call) -> Call:
        def call(*args: Any, clip_ratio: float, **kwargs: Any) -> Any:
            q, scale = operator(*args, clip_ratio=1.0, **kwargs)
            return q, scale / clip_ratio

        return call

    patch("npu_kronecker_quant", change)
    lines = failures("quantize")
    assert lines
    assert all("clip 0.5: scale: " in line for line in lines)  # with a clip ratio of 1 both rules agree
    assert all("the inverse of clip_ratio is used, as in torch_npu's skipped test" in line for line in lines)


def test_bias_refused(patch: Call) -> None:
    def change(operator: Call) -> Call:
        def call(*args: Any, bias: Any = None, **kwargs: Any) -> Any:
            if bias is not None:
                raise RuntimeError("call aclnnQuantMatmulV5 failed: bias must be null when x1 is int4")
            return operator(*args, bias=bias, **kwargs)

        return call

    patch("npu_quant_matmul", change)
    lines = failures("multiply", "layout")
    assert lines
    assert all("product and bias" in line and "the operator refuses the bias: call aclnn" in line for line in lines)


def test_bias_ignored(patch: Call) -> None:
    patch("npu_quant_matmul", lambda operator: lambda *args, bias=None, **kwargs: operator(*args, **kwargs))
    lines = failures("multiply")
    assert lines
    assert all("the bias was not added" in line for line in lines)


def test_a_library_with_an_undefined_symbol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / fused.LIBRARY
    source = "int AscendLaunchKernelWithHostArgs(void); int run(void) { return AscendLaunchKernelWithHostArgs(); }"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(file)]
    subprocess.run(command, input=source, text=True, check=True, timeout=60)
    monkeypatch.setattr(fused, "library_file", lambda: file)
    fused.unavailable_reason.cache_clear()
    line, *others = check("library", "linear", has_fused_library=True)
    assert others
    assert all(other.startswith("skipped") and "the fused library is not loaded" in other for other in others)
    assert line.startswith("FAILED")
    assert f"{file}: undefined symbol AscendLaunchKernelWithHostArgs. Build it again" in line
    fused.unavailable_reason.cache_clear()


def test_stale_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_npu.device.NPUGraph, "replay", lambda self: None)
    lines = failures("graph")
    assert lines
    assert all("replay 2" in line and "(the graph ignores its new inputs)" in line for line in lines)


@pytest.mark.parametrize(
    ("cores", "problem"),
    [((20, 40), "a 910B2 has 24 cube cores. Is the device divided"), ((24, 24), "two vector cores for each cube core")],
)
def test_wrong_core_count(monkeypatch: pytest.MonkeyPatch, cores: tuple[int, int], problem: str) -> None:
    monkeypatch.setattr(torch_npu.device, "cores", cores)
    (line,) = failures("device")
    assert problem in line


def nudged(rounding: Callable[[torch.Tensor], torch.Tensor], error: float) -> Callable[[Call], Call]:
    """npu_kronecker_quant whose division errs, or whose rounding is another one."""

    def change(operator: Call) -> Call:
        def call(x: torch.Tensor, p1: torch.Tensor, p2: torch.Tensor, clip_ratio: float, dst_dtype: Any) -> Any:
            z = (p1.double() @ (x.double() @ p2.double()).to(x.dtype).double()).half().flatten(1)
            largest = z.abs().amax(1).float()
            values = (z.float() * ((7 / clip_ratio) / largest * (1 + error))[:, None]).half().float()
            q = rounding(values).clamp(-8, 7).to(torch.int32)
            words = torch_npu.npu_convert_weight_to_int4pack(q)
            return words.view(*x.shape[:2], -1), largest * clip_ratio / 7 * (1 + error)

        return call

    return change


def test_division_that_errs_in_the_last_place_is_counted(patch: Call) -> None:
    def change(operator: Call) -> Call:
        def call(x: torch.Tensor, dst_type: Any) -> Any:
            scale = x.float().abs().amax(-1) / 7 * (1 - 2.0**-23)
            q = (x.float() / scale[:, None]).round().clamp(-8, 7).to(torch.int32)
            return torch_npu.npu_convert_weight_to_int4pack(q), scale

        return call

    patch("npu_dynamic_quant", change)
    patch("npu_kronecker_quant", nudged(torch.round, 2.0**-23))
    lines = check("quantize")
    assert failures("quantize") == []
    assert all("scales off in the last place" in line for line in lines)
    assert any("[unfused]" in line and "values one step away at ties" in line for line in lines)


def test_division_that_errs_in_the_fused_library(library: Faults) -> None:
    library.division = 2.0**-23
    assert failures("linear", has_fused_library=True) == []
    library.division = 2.0**-6
    assert failures("linear", has_fused_library=True)


def test_another_rounding_is_no_tie(patch: Call) -> None:
    patch("npu_kronecker_quant", nudged(torch.floor, 0.0))
    lines = failures("quantize")
    assert lines
    assert all("all by one step, but not at ties" in line for line in lines)


def test_minus_eight_is_missed(patch: Call) -> None:
    patch("npu_kronecker_quant", nudged(lambda values: values.round().clamp(min=-7), 0.0))
    lines = failures("quantize")
    assert lines
    assert all("clip 0.5" in line and "values stop at -7 where -8 is expected" in line for line in lines)


def test_nan_is_lost(patch: Call) -> None:
    patch("npu_kronecker_quant", lambda operator: lambda x, *args, **kwargs: operator(x.nan_to_num(0), *args, **kwargs))
    lines = failures("nonfinite")
    assert lines
    assert all("[kronecker]" in line and "NaN is lost" in line and "are finite" in line for line in lines)


def test_out_of_memory(patch: Call) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("NPU out of memory. Tried to allocate 256.00 MiB (NPU 0; 60.96 GiB total capacity)")

    patch("npu_quant_matmul", lambda operator: refuse)
    lines = failures("multiply")
    assert lines
    assert all("out of memory: stop other processes on this device (npu-smi info)" in line for line in lines)


def test_old_cann(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [report.line(*found) for found in version_outcomes({"CANN": "8.1.RC1", "torch-npu": "2.10.0.post4"})]
    assert lines == ["FAILED  CANN: 8.1.RC1, needs 8.5 or later", "ok      torch-npu: 2.10.0.post4"]
    monkeypatch.delattr(torch_npu, "npu_kronecker_quant")
    assert any("this torch_npu lacks an operator" in line for line in failures("quantize"))


@pytest.mark.parametrize(
    ("switch", "problem"),
    [("swaps", "the two int4 values of each byte are swapped"), ("transposes", "left_trans acts as its transpose")],
)
def test_faults_of_the_fused_library(library: Faults, switch: str, problem: str) -> None:
    setattr(library, switch, True)
    lines = failures("layout", has_fused_library=True)
    wrong_phases = failures("phases", has_fused_library=True)
    # A transposed factor is wrong from the first phase on, a wrong weight only from the second.
    alone = [line for line in wrong_phases if "transform and quantize alone" in line]
    assert wrong_phases
    assert bool(alone) is (switch == "transposes")
    assert [line for line in lines if "[fused]" in line and problem in line]
    assert all("[fused]" in line for line in lines)
    assert failures("linear", has_fused_library=True)
