# SPDX-License-Identifier: Apache-2.0
"""Registration where vllm-ascend is vLLM's platform and has a quantization method "ascend" of its own.

vLLM keeps the class that was registered last. vllm-ascend registers its class when the module that defines it is first
imported, and the time at which its platform imports it differs between processes. So we first call the platform's hook
that imports it, and then register our class: later calls of the hook import nothing new.
"""

import logging
import multiprocessing
from importlib.metadata import version

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.constants import LOGGER, METHOD, SUPPORTED_VLLM_ASCEND, VERSION

from .versions import is_tested

INT4_DEVICES = ("A2", "A3")
"""vllm-ascend's names for the device generations whose cube unit multiplies int4."""

logger = logging.getLogger(LOGGER)


def is_platform() -> bool:
    """Whether vLLM's platform is vllm-ascend; the package may be installed and yet be left out of VLLM_PLUGINS."""
    from vllm.platforms import current_platform

    return type(current_platform).__module__.partition(".")[0] == "vllm_ascend"


def register() -> None:
    """Register our class in place of vllm-ascend's for the method "ascend", or log why not. Idempotent."""
    from vllm.model_executor.layers.quantization import (
        _CUSTOMIZED_METHOD_TO_QUANT_CONFIG,
        register_quantization_config,
    )
    from vllm.platforms import current_platform

    reason = _unsupported_reason()
    if reason:
        _say(logging.WARNING, f"vllm-w4a4-plugin {VERSION} leaves all layers to vllm-ascend: {reason}")
        return
    current_platform.pre_register_and_update()

    from vllm_w4a4_plugin.quantization.ascend_config import AscendW4A4ModelSlimConfig

    if _CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(METHOD) is AscendW4A4ModelSlimConfig:
        return
    register_quantization_config(METHOD)(AscendW4A4ModelSlimConfig)
    _say(
        logging.INFO,
        f"vllm-w4a4-plugin {VERSION} extends the quantization method {METHOD!r} of vllm-ascend {_version()}: W4A4 "
        "linear layers and experts run in the plugin, all others in vllm-ascend. VLLM_W4A4_DISABLE=1 disables the "
        "plugin.",
    )


def _unsupported_reason() -> str:
    from vllm_ascend.utils import get_ascend_device_type

    device = get_ascend_device_type().name
    if device not in INT4_DEVICES:
        return f"this vllm-ascend is built for {device} devices, which have no int4 matrix product."
    found = _version()
    if is_tested(found, SUPPORTED_VLLM_ASCEND):
        return ""
    supported = f"it supports vllm-ascend {' to '.join(SUPPORTED_VLLM_ASCEND)}, this is vllm-ascend {found}"
    if envs.VLLM_W4A4_FORCE:
        _say(logging.WARNING, f"vllm-w4a4-plugin {VERSION}: {supported}. It is used because VLLM_W4A4_FORCE is set.")
        return ""
    return f"{supported}. Set VLLM_W4A4_FORCE=1 to use the plugin anyway."


def _version() -> str:
    return version("vllm-ascend")


def _say(level: int, text: str) -> None:
    """Log in the process that the user started; every engine and worker process would repeat it."""
    if multiprocessing.parent_process() is None:
        logger.log(level, "%s", text)
