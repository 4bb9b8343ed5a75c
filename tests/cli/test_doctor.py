# SPDX-License-Identifier: Apache-2.0
"""The command; its figures are tested in tests/capacity."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cases import write_case
from tests.conftest import MICRO
from vllm_w4a4_plugin.cli import main


def test_qwen3_32b_fits_one_device(config_only: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(config_only())]) == 0
    out = capsys.readouterr().out
    assert "It fits." in out
    for text in (
        "W4A4_FLATQUANT_DYNAMIC",
        "npu_kronecker_quant + npu_quant_matmul",
        "KV cache",
        "per token",
        "torch-npu",
    ):
        assert text in out


def test_what_does_not_fit(config_only: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = str(config_only())
    assert main(["doctor", model, "--max-model-len", "131072"]) == 1
    out = capsys.readouterr().out
    assert "It does not fit" in out
    assert "use more devices" in out
    assert main(["doctor", model, "--max-model-len", "131072", "--tensor-parallel-size", "2"]) == 0


def test_json(config_only: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(config_only()), "--json", "--tensor-parallel-size", "2", "--device", "910B3"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["fits"]
    assert data["device"] == "910B3"
    assert data["memory"]["total_weights"] == pytest.approx(32.6e9 / 2, rel=0.02)
    assert [step["tokens"] for step in data["steps"]][:2] == [1, 16]
    assert data["steps"][0]["linears"] == pytest.approx(18.4e-3 / 2, rel=0.02)
    assert data["steps"][-1]["sequences"] == 1
    assert set(data["versions"]) >= {"CANN", "torch-npu", "vllm-ascend", "vllm", "driver"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "910A"], "unknown device '910A'"),
        (["--tensor-parallel-size", "0"], "must be at least 1"),
        (["--gpu-memory-utilization", "1.5"], "must be in (0, 1]"),
        (["--tensor-parallel-size", "7"], "cannot be"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(MICRO), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_it_needs_neither_vllm_nor_torch_for_a_checkpoint() -> None:
    """Where torch is missing, values are not compared."""
    code = (
        "import sys; sys.modules['torch'] = None; from vllm_w4a4_plugin.cli import main; "
        f"print(main(['doctor', {str(MICRO)!r}]), 'vllm' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "It fits." in result.stdout
    assert result.stdout.strip().splitlines()[-1] == "0 False", result.stderr


def test_a_checkpoint_that_would_be_refused(
    micro_copy: Path, edit_tensors: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensors(remove=("model.layers.1.self_attn.q_proj.clip_ratio",))
    assert main(["verify", str(micro_copy)]) == 1
    finding = capsys.readouterr().out.splitlines()[0]
    assert main(["doctor", str(micro_copy)]) == 1
    out = capsys.readouterr().out
    assert "It would be refused:" in out
    assert finding in out
    assert main(["doctor", str(micro_copy), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert not data["fits"]
    assert data["problems"][0] == finding


def test_w4a4_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case("c1_moe_w4", tmp_path)
    assert main(["doctor", str(tmp_path)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "npu_grouped_matmul" in line]
    assert row.split("  ")[0] == "gate_proj up_proj down_proj"
    assert "npu_dynamic_quant + npu_grouped_matmul" in row


def test_experts_that_cannot_be_divided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """128 intermediate features on 32 devices are 4 on each, less than an int32 of int4 values."""
    write_case("c1_moe_w4", tmp_path)
    assert main(["doctor", str(tmp_path), "--tensor-parallel-size", "32", "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert any("4 intermediate features, int4 operators of the NPU need a multiple of 8" in text for text in problems)


def test_whole_experts_on_each_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 experts: on 4 devices one each, which takes the same memory as a quarter of every one; 3 cannot share them."""
    write_case("c1_moe_w4", tmp_path)
    experts = {}
    for options in ([], ["--enable-expert-parallel"]):
        assert main(["doctor", str(tmp_path), "--tensor-parallel-size", "4", "--json", *options]) == 0
        data = json.loads(capsys.readouterr().out)
        found = next(k for k in data["kernels"] if "npu_grouped_matmul" in k["kernel"])
        experts[bool(options)] = found["count"], data["memory"]["weights"][found["quant_type"]], data["steps"]
    assert experts[False][0] == 4 * experts[True][0]
    assert experts[True][1] == pytest.approx(experts[False][1], rel=0.3)  # each device has the scales of whole rows
    assert experts[True][2][-1]["linears"] == pytest.approx(experts[False][2][-1]["linears"])
    assert main(["doctor", str(tmp_path), "--tensor-parallel-size", "3", "--enable-expert-parallel"]) == 1
    error = capsys.readouterr().err
    assert "layer model.layers.0.mlp.experts: expected a number of expert-parallel ranks that divides the 4" in error
    assert "found 3. Use another --tensor-parallel-size, or no --enable-expert-parallel." in error


def test_float_experts_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case("c4_moe_mixed", tmp_path)
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["fits"]
    experts = 4 * 3 * 128 * 192 * 2
    others = 4 * 192 * 2 + 512 * 192 * 2  # router and head
    assert data["memory"]["weights"]["FLOAT"] == experts + others


def test_a_type_that_vllm_ascend_runs_is_no_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case("e1_static", tmp_path)
    assert main(["doctor", str(tmp_path)]) == 0
    assert "vllm-ascend" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing, so the model cannot be planned"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive whole number, found 0"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"head_dim": "x"}, "head_dim must be a positive whole number, found 'x'"),
        ({"num_key_value_heads": -1}, "num_key_value_heads must be a positive whole number, found -1"),
        ({"text_config": "x", "vocab_size": None}, "vocab_size is missing"),
        ({"num_experts": 8}, "a model with experts can only be planned from its quantized weights"),
    ],
)
def test_configs_that_cannot_be_planned(
    config_only: Callable[..., Path], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert main(["doctor", str(config_only(**changes))]) == 1
    error = capsys.readouterr().err
    assert "config.json" in error or "can only be planned" in error
    assert message in error
