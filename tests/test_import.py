# SPDX-License-Identifier: Apache-2.0
"""What importing and registering costs and does, each in a process of its own."""

import subprocess
import sys


def run_python(code: str, **environment: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


def test_importing_the_package_is_light() -> None:
    code = "import sys, vllm_w4a4_plugin; print(sorted({'torch', 'vllm', 'torch_npu', 'pydantic'} & set(sys.modules)))"
    assert run_python(code) == "[]"


def test_reading_checkpoints_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, vllm_w4a4_plugin.checkpoint.verify, vllm_w4a4_plugin.cli; "
        "print(sorted({'torch', 'vllm'} & set(sys.modules)))"
    )
    assert run_python(code) == "[]"


def test_registering_twice_registers_once() -> None:
    code = """
from vllm_w4a4_plugin import register
register(); register()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
print(QUANTIZATION_METHODS.count("ascend"), get_quantization_config("ascend").__name__)
"""
    assert run_python(code) == "1 AscendW4A4Config"


def test_our_platform_replaces_the_plain_cpu_platform() -> None:
    code = "from vllm.platforms import current_platform as p; print(type(p).__name__, p.is_cpu())"
    assert run_python(code) == "W4A4CpuPlatform True"


def test_disabled_plugin_leaves_vllm_alone() -> None:
    code = """
from vllm.plugins import load_general_plugins
from vllm.platforms import current_platform
load_general_plugins()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
print(type(current_platform).__name__, "ascend" in QUANTIZATION_METHODS)
"""
    assert run_python(code, VLLM_W4A4_DISABLE="1") == "CpuPlatform False"
    assert run_python(code, VLLM_PLUGINS="something_else") == "CpuPlatform False"


def test_quantization_works_on_a_cpu_platform_that_is_not_ours() -> None:
    """VLLM_TARGET_DEVICE=cpu bypasses out-of-tree platforms."""
    code = """
from vllm.plugins import load_general_plugins
from vllm.platforms import current_platform
load_general_plugins()
from vllm.model_executor.layers.quantization import get_quantization_config
print(type(current_platform).__name__, get_quantization_config("ascend").__name__)
"""
    assert run_python(code, VLLM_TARGET_DEVICE="cpu") == "CpuPlatform AscendW4A4Config"
