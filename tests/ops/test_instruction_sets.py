# SPDX-License-Identifier: Apache-2.0
"""Every instruction set that this machine can run passes the same conformance tests."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_w4a4_plugin import ops

CONFORMANCE = [
    str(Path(__file__).parent / name)
    for name in (
        "test_conformance.py",
        "test_experts.py",
        "test_nonfinite.py",
        "test_steps.py",
        "test_wide_operators.py",
    )
]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name", [name for name in ops.cpu_available_instruction_sets() if name != ops.cpu_instruction_set()]
)
def test_conformance(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *CONFORMANCE],
        cwd=ROOT,
        env={**os.environ, "VLLM_W4A4_ISA": name},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def run_forced(name: str) -> subprocess.CompletedProcess[str]:
    code = "from vllm_w4a4_plugin import ops; print(ops.cpu_instruction_set())"
    environment = {**os.environ, "VLLM_W4A4_ISA": name}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_the_variable_forces_a_set() -> None:
    assert run_forced("portable").stdout.strip() == "portable"


def test_an_unknown_set_is_an_error_that_lists_what_there_is() -> None:
    result = run_forced("mmx")
    assert result.returncode != 0
    assert "VLLM_W4A4_ISA=mmx: unknown instruction set" in result.stderr
    assert f"This CPU has: {', '.join(ops.cpu_available_instruction_sets())}" in result.stderr


def test_a_set_that_this_cpu_lacks_is_an_error() -> None:
    known = (
        {"avx512amx", "avx512vnni", "avxvnni", "avx2", "portable"} if platform.machine() == "x86_64" else {"neon_i8mm"}
    )
    lacking = known - set(ops.cpu_available_instruction_sets())
    for name in lacking:
        assert "this CPU does not have it" in run_forced(name).stderr
