# SPDX-License-Identifier: Apache-2.0
"""tests/npu beside the real wheels of vllm-ascend and vLLM 0.23, in an environment of its own (`make test-npu`)."""

import subprocess
import sys

from tools.npu_environment import ROOT, environment


def test_beside_vllm_ascend() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/npu"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout.splitlines()[-1], result.stdout
