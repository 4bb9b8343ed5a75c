# SPDX-License-Identifier: Apache-2.0
"""Registers the quantization method "ascend", on whichever platform vLLM runs."""

import logging

from vllm_w4a4_plugin.constants import LOGGER, METHOD, TESTED_VLLM, VERSION

from . import vllm_ascend
from .versions import is_tested

logger = logging.getLogger(LOGGER)


def register_method() -> None:
    """Register the method in this process. Idempotent."""
    if vllm_ascend.is_platform():
        _warn_of_untested_vllm()
        vllm_ascend.register()
        return
    from vllm.model_executor.layers.quantization import (
        _CUSTOMIZED_METHOD_TO_QUANT_CONFIG,
        register_quantization_config,
    )

    from vllm_w4a4_plugin.quantization.config import AscendW4A4Config
    from vllm_w4a4_plugin.quantization.loading.loader import register_loader

    _warn_of_untested_vllm()
    register_loader()
    if _CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(METHOD) is not AscendW4A4Config:
        register_quantization_config(METHOD)(AscendW4A4Config)


def _warn_of_untested_vllm() -> None:
    from vllm import __version__ as version

    if not is_tested(version, TESTED_VLLM):
        logger.warning(
            "vllm-w4a4-plugin %s was tested with vLLM %s to %s, this is vLLM %s", VERSION, *TESTED_VLLM, version
        )
