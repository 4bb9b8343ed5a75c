# SPDX-License-Identifier: Apache-2.0
"""tests/npu with the real wheels of vllm-ascend and vLLM 0.23, in an environment of its own (`make test-npu`)."""

import subprocess
import sys

import pytest

from tools.npu_environment import ROOT, environment
from vllm_w4a4_plugin.constants import TESTED_VLLM_ASCEND
from vllm_w4a4_plugin.platforms.versions import is_tested


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.23.0", True), ("0.23.1rc2", True), ("0.22.9", False), ("0.24.0", False), ("0.9.1", False), ("1.23", False),
     ("0.231.0", False), ("dev", True)],
)  # fmt: skip
def test_tested_versions(version: str, expected: bool) -> None:
    assert is_tested(version, TESTED_VLLM_ASCEND) is expected


def test_inside_vllm_ascend() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/npu"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout.splitlines()[-1], result.stdout
