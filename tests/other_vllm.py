# SPDX-License-Identifier: Apache-2.0
"""Runs tests with another vLLM than the environment's, without its C extension, so that no engine starts.

The other vLLM is in a directory of its own, ahead of the environment's on the path; everything else it needs comes from
the environment, for whose torch its C extension was not built.
"""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import vllm_w4a4_plugin

ROOT = Path(__file__).parents[1]
TESTS = ["tests/quantization", "tests/platforms/test_detection.py", "tests/test_import.py"]


def run(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


def check_version(directory: Path, version: str) -> None:
    found = run(directory, "-c", "import vllm; print(vllm.__version__)")
    assert found.stdout.strip().splitlines()[-1].startswith(version), found.stderr


def check_imports(directory: Path) -> None:
    """Every module of the package, in one process."""
    modules = [
        module.name
        for module in pkgutil.walk_packages(vllm_w4a4_plugin.__path__, "vllm_w4a4_plugin.")
        # vllm-ascend is not installed here (tests/npu imports it), lm-eval is an extra, and the native libraries are no
        # modules.
        if not module.name.endswith(("ascend_config", "evaluation.harness")) and ".lib" not in module.name
    ]
    assert len(modules) > 100
    code = f"import importlib, vllm\nfor name in {modules!r}: importlib.import_module(name)"
    result = run(directory, "-c", code)
    assert result.returncode == 0, result.stderr[-4000:]


def check_tests(directory: Path) -> None:
    result = run(directory, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
