# SPDX-License-Identifier: Apache-2.0
"""The lowest vLLM that we declare, 0.23 (the one that vllm-ascend 0.23 pairs with), without its C extension.

Its CPU build is put into a directory of its own, ahead of the environment's vLLM on the path; everything else it needs
comes from the environment. Its C extension belongs to another torch and does not load, so no engine starts here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import npu_environment
from vllm_w4a4_plugin.constants import TESTED_VLLM

ROOT = Path(__file__).parents[1]
LOWEST = f"{TESTED_VLLM[0]}.0"
TESTS = ["tests/quantization", "tests/platforms/test_detection.py", "tests/test_import.py"]


@pytest.fixture(scope="module")
def lowest_vllm() -> Path:
    assert npu_environment.RELEASES[npu_environment.DEFAULT].vllm == LOWEST
    return npu_environment.vllm()


def test_everything_that_needs_no_c_extension(lowest_vllm: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(lowest_vllm)}
    version = subprocess.run(
        [sys.executable, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, env=environment
    )
    assert version.stdout.strip().splitlines()[-1].startswith(LOWEST), version.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
