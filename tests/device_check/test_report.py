# SPDX-License-Identifier: Apache-2.0
"""Exit codes, and what the environment's lines say."""

import pytest

from vllm_w4a4_plugin.capacity.devices import GIB
from vllm_w4a4_plugin.cli import main
from vllm_w4a4_plugin.device_check import report
from vllm_w4a4_plugin.device_check.environment import device_outcome, set_env_outcome
from vllm_w4a4_plugin.device_check.outcome import Outcome, Status, failed, passed
from vllm_w4a4_plugin.device_check.plan import Phase, Step
from vllm_w4a4_plugin.device_check.run import NO_DEVICE, Result
from vllm_w4a4_plugin.ops.npu.select import Kernel

OK, BAD, SKIPPED = passed(), failed("wrong"), Outcome(Status.SKIPPED, "no")


def result(outcome: Outcome, phase: Phase = Phase.CANN, kernel: str = "") -> Result:
    return Result(Step("layout", phase, "title", kernel), outcome)


@pytest.mark.parametrize(
    ("environment", "results", "code"),
    [
        ([OK], [result(OK)], report.PASSED),
        ([OK], [result(OK), result(SKIPPED)], report.PASSED),
        ([BAD], [result(OK)], report.FAILED),
        ([OK], [result(BAD), result(OK)], report.FAILED),
        ([OK], [result(OK), result(BAD, Phase.FUSED)], report.FUSED_FAILED),
        ([OK], [result(OK), result(BAD, Phase.TIMES, Kernel.FUSED)], report.FUSED_FAILED),
        ([OK], [result(BAD), result(BAD, Phase.FUSED)], report.FAILED),
        ([BAD], [result(BAD), result(Outcome(Status.SKIPPED, NO_DEVICE))], report.NO_NPU),
    ],
)
def test_exit_codes(environment: list[Outcome], results: list[Result], code: int) -> None:
    assert report.exit_code(environment, results) == code


def test_the_file_has_everything() -> None:
    found = report.as_json("model", 2, {"CANN": OK}, [result(BAD)], report.FAILED)
    assert found["format"] == report.FORMAT
    assert found["steps"][0]["message"] == "wrong"
    assert found["verdict"].startswith("Failed.")


@pytest.mark.parametrize(
    ("name", "cores", "free", "status", "words"),
    [
        ("Ascend910B3", (20, 40), 60, "ok", "20 cube and 40 vector cores"),
        ("Ascend910B2", (None, None), 60, "ok", "core count unknown"),
        ("Ascend910B2", (12, 24), 60, "FAILED", "a 910B2 has 24 cube cores"),
        ("Ascend910B2", (24, 48), 1, "note", "less than 4 GiB"),
        ("Ascend950", (32, 64), 60, "note", "not one of 910B1"),
    ],
)
def test_devices(name: str, cores: tuple[int | None, int | None], free: int, status: str, words: str) -> None:
    outcome = device_outcome(name, *cores, free * GIB, 64 * GIB)
    assert outcome.status == status
    assert words in outcome.message


def test_set_env(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert "set_env.sh" in set_env_outcome().message
    monkeypatch.setenv("ASCEND_HOME_PATH", "/opt/cann")
    assert set_env_outcome() == passed("sourced, CANN is in /opt/cann")


def test_doctor_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 1
    assert "--device-check to check this machine's NPU" in capsys.readouterr().err


def test_no_npu(tmp_path, capfd: pytest.CaptureFixture[str]) -> None:
    """On this machine torch_npu cannot be imported."""
    file = tmp_path / "report.json"
    assert main(["doctor", "--device-check", "--report", str(file)]) == report.NO_NPU
    out = capfd.readouterr().out
    assert "FAILED  device: ModuleNotFoundError: No module named 'torch_npu'" in out
    assert "Not checked: no NPU could be used." in out
    assert file.exists()
