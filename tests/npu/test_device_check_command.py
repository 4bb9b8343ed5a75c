# SPDX-License-Identifier: Apache-2.0
"""The device check in processes of its own, on the stand-in: what hangs or crashes, and the command as users run it."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.npu.processes import MICRO
from tests.npu.test_device_check import layers
from vllm_w4a4_plugin.cli import main
from vllm_w4a4_plugin.device_check import plan, report
from vllm_w4a4_plugin.device_check.plan import Phase, Step, make_plan
from vllm_w4a4_plugin.device_check.run import run_plan


def test_a_hang_and_a_crash_are_survived() -> None:
    planned = make_plan(layers(), False)
    steps = [next(step for step in planned if step.kind == kind) for kind in ("pack", "device")]
    crash = next(step for step in planned if step.kind == "graph" and "o_proj" in step.title)
    hanging = Step(**{**steps[0].as_json(), "limit": 1.0})
    crashing = Step("quantize", Phase.CANN, "crash", crash.kernel, {**crash.arguments, "tokens": (1,)})
    worker = [sys.executable, str(Path(__file__).parent / "faulty_worker.py")]
    begun: list[str] = []
    results = run_plan([hanging, steps[1], crashing, steps[1]], "cpu", lambda s: begun.append(s.title), print, worker)
    hang, device, crashed, again = [report.line(report.title_of(r.step), r.outcome) for r in results]
    assert hang == "FAILED  weight packing: hangs: nothing came back within 1 s"
    assert device.startswith("ok")
    assert again.startswith("ok")
    assert crashed.startswith("FAILED  [unfused] crash: ")
    assert begun[0] == "weight packing"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """As a user runs it, in a container-like environment: lines, exit code, file."""
    (tmp_path / "version.cfg").write_text("runtime_running_version=[9.0.0:9.0.0]\n")
    package = tmp_path / "site" / "torch_npu-2.10.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.10.0\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(plan, "TIMED_TOKENS", (1,))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    file = tmp_path / "report.json"
    assert main(["doctor", str(MICRO), "--device-check", "--npu", "cpu", "--report", str(file)]) == report.PASSED
    out = capfd.readouterr().out
    assert "ok      CANN: 9.0.0" in out
    assert "ok      [kronecker] time, qkv_proj 512 x 192, 12 x 16: 1 tokens" in out
    assert "Please attach it to an issue" in out
    found = json.loads(file.read_text())
    assert found["exit_code"] == 0
    assert {step["status"] for step in found["steps"]} == {"ok"}
    assert found["environment"]["CANN"]["data"]["version"] == "9.0.0"
