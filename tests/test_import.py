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
    """vLLM chooses one of its own with VLLM_TARGET_DEVICE=cpu (from 0.24 on) and on AMD Zen with zentorch."""
    code = """
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform
vllm.platforms._current_platform = CpuPlatform()
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import current_platform
print(type(current_platform).__name__, get_quantization_config("ascend").__name__)
"""
    assert run_python(code) == "CpuPlatform AscendW4A4Config"


def test_an_untested_vllm_is_named() -> None:
    code = """
import logging, vllm
logging.basicConfig(format="%(message)s")
vllm.__version__ = "0.99.1"
import vllm_w4a4_plugin
records = []
logging.getLogger("vllm.plugins.w4a4").addFilter(lambda record: records.append(record.getMessage()) or True)
vllm_w4a4_plugin.register()
print(records)
"""
    assert "tested with vLLM 0.23 to 0.33, this is vLLM 0.99.1" in run_python(code)
