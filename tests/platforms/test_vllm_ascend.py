# SPDX-License-Identifier: Apache-2.0
"""tests/npu with vllm-ascend's real Python code and the vLLM it belongs to, in an environment of its own.

`make test-npu` runs the same.
"""

import subprocess
import sys

import pytest

from tools.npu_environment import RELEASES, ROOT, environment
from vllm_w4a4_plugin.constants import SUPPORTED_VLLM_ASCEND
from vllm_w4a4_plugin.platforms.versions import is_tested


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.20.2", True), ("0.23.0", True), ("0.23.1rc2", True), ("0.30.0rc2", True), ("0.19.1", False),
     ("0.31.0", False), ("0.9.1", False), ("1.23", False), ("0.231.0", False), ("dev", True)],
)  # fmt: skip
def test_supported_versions(version: str, expected: bool) -> None:
    assert is_tested(version, SUPPORTED_VLLM_ASCEND) is expected


@pytest.mark.parametrize("release", RELEASES)
def test_inside_vllm_ascend(release: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/npu"]
    result = subprocess.run(command, cwd=ROOT, env=environment(release), capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout.splitlines()[-1], result.stdout
