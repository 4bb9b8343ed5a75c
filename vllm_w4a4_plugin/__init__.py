# SPDX-License-Identifier: Apache-2.0
"""Integer W4A4 FlatQuant models under vLLM.

vLLM finds this package through two entry points named `w4a4`: `platform_plugin` (group `vllm.platform_plugins`) and
`register` (group `vllm.general_plugins`). Importing the package imports neither vLLM nor torch.
"""

from . import envs
from .constants import VERSION as __version__

__all__ = ["__version__", "platform_plugin", "register"]


def platform_plugin() -> str | None:
    """Qualified name of our CPU platform where vLLM would choose its own CPU platform, None everywhere else."""
    if envs.VLLM_W4A4_DISABLE:
        return None
    from .platforms.detection import would_choose_cpu_platform

    return "vllm_w4a4_plugin.platforms.cpu.W4A4CpuPlatform" if would_choose_cpu_platform() else None


def register() -> None:
    """Register the quantization method "ascend" in this process. Idempotent; vLLM calls it in every process."""
    if envs.VLLM_W4A4_DISABLE:
        return
    from .platforms.registration import register_method

    register_method()
