# SPDX-License-Identifier: Apache-2.0
"""Integer W4A4 FlatQuant models under vLLM.

vLLM finds this package through two entry points named `w4a4`: `platform_plugin` (group `vllm.platform_plugins`) and
`register` (group `vllm.general_plugins`). Importing the package imports neither vLLM nor torch.
"""

import logging
import os

__version__ = "0.1.0"

METHOD = "ascend"
"""Name of the quantization method, the one that vllm-ascend's users know."""

TESTED_VLLM = ("0.23", "0.32")
"""First and last minor version of vLLM that the tests run with."""

DISABLE_VARIABLE = "VLLM_W4A4_DISABLE"

logger = logging.getLogger("vllm.plugins.w4a4")


def platform_plugin() -> str | None:
    """Qualified name of our CPU platform where vLLM would choose its own CPU platform, None everywhere else."""
    if _is_disabled():
        return None
    from vllm_w4a4_plugin.detection import cpu_platform_is_due

    return "vllm_w4a4_plugin.platform.W4A4CpuPlatform" if cpu_platform_is_due() else None


def register() -> None:
    """Register the quantization method "ascend" in this process. Idempotent; vLLM calls it in every process."""
    if _is_disabled():
        return
    from vllm_w4a4_plugin import beside_ascend

    if beside_ascend.is_platform():
        _warn_of_untested_vllm()
        beside_ascend.register()
        return
    from vllm.model_executor.layers.quantization import (
        _CUSTOMIZED_METHOD_TO_QUANT_CONFIG,
        register_quantization_config,
    )

    from vllm_w4a4_plugin.quantization.config import AscendW4A4Config

    _warn_of_untested_vllm()
    if _CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(METHOD) is not AscendW4A4Config:
        register_quantization_config(METHOD)(AscendW4A4Config)


def _warn_of_untested_vllm() -> None:
    from vllm import __version__ as version

    if not is_tested(version, TESTED_VLLM):
        logger.warning(
            "vllm-w4a4-plugin %s was tested with vLLM %s to %s, this is vLLM %s", __version__, *TESTED_VLLM, version
        )


def is_tested(version: str, tested: tuple[str, str]) -> bool:
    """Whether `version` lies within a range of minor versions. One without numbers (a development build) does."""
    first, last = (tuple(map(int, text.split("."))) for text in tested)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    return not numbers or first <= numbers <= last


def _is_disabled() -> bool:
    return os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0")
