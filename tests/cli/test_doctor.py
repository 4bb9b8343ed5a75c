# SPDX-License-Identifier: Apache-2.0
"""The command; its figures are tested in tests/capacity."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
    code = (
        "import sys; from vllm_w4a4_plugin.cli import main; "
        f"main(['doctor', {str(MICRO)!r}]); print(sorted({{'torch', 'vllm'}} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip().splitlines()[-1] == "[]", result.stderr
