# SPDX-License-Identifier: Apache-2.0
"""Integer W4A4 FlatQuant models under vLLM.

vLLM finds this package through two entry points, both named `w4a4`: `platform` (group `vllm.platform_plugins`) and
`register` (group `vllm.general_plugins`). Importing the package imports neither vLLM nor torch.
"""

import logging
import os
from importlib.util import find_spec

__version__ = "0.1.0"

METHOD = "ascend"
"""Name of the quantization method, the one that vllm-ascend's users know."""

DISABLE_VARIABLE = "VLLM_W4A4_DISABLE"

logger = logging.getLogger("vllm.plugins.w4a4")


def platform() -> str | None:
    """Qualified name of our CPU platform where vLLM would choose its own CPU platform, None everywhere else."""
    if _is_disabled():
        return None
    from vllm_w4a4_plugin.detection import cpu_platform_is_due

    return "vllm_w4a4_plugin.platform.W4A4CpuPlatform" if cpu_platform_is_due() else None


def register() -> None:
    """Register the quantization method "ascend" in this process. Idempotent; vLLM calls it in every process."""
    if _is_disabled() or find_spec("vllm_ascend") is not None:
        # Beside vllm-ascend the name is its own.
        return
    from vllm.model_executor.layers.quantization import (
        _CUSTOMIZED_METHOD_TO_QUANT_CONFIG,
        register_quantization_config,
    )

    from vllm_w4a4_plugin.quantization.config import AscendW4A4Config

    if _CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(METHOD) is not AscendW4A4Config:
        register_quantization_config(METHOD)(AscendW4A4Config)


def _is_disabled() -> bool:
    return os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0")
