# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform plus what W4A4 checkpoints need before weights load."""

import logging
from typing import TYPE_CHECKING

import torch
from vllm.platforms.cpu import CpuPlatform

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.constants import DESCRIPTION_FILE, LOAD_FORMAT, LOGGER, METHOD

from . import dtype as dtypes
from .registration import register_method

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser

logger = logging.getLogger(LOGGER)

LOAD_FORMATS = ("auto", "hf", "safetensors", LOAD_FORMAT)
"""Load formats that hand over one checkpoint tensor at a time under its own name; our loader stands in for them."""


class W4A4CpuPlatform(CpuPlatform):
    """Adds the `--quantization ascend` choice, auto-detection of checkpoints, and early checks."""

    @classmethod
    def pre_register_and_update(cls, parser: "FlexibleArgumentParser | None" = None) -> None:
        super().pre_register_and_update(parser)
        register_method()
        action = parser._option_string_actions.get("--quantization") if parser is not None else None
        if action is not None and action.choices is not None and METHOD not in action.choices:
            action.choices = [*action.choices, METHOD]

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: "VllmConfig") -> None:
        super().apply_config_platform_defaults(vllm_config)
        model_config = vllm_config.model_config
        if model_config is None:
            return
        if model_config.quantization is None:
            cls._detect(vllm_config)
        if model_config.quantization == METHOD:
            # vLLM checks that every parameter was loaded for unquantized models only, unless it is told to.
            extra = vllm_config.load_config.model_loader_extra_config
            if vllm_config.load_config.load_format in LOAD_FORMATS and isinstance(extra, dict):
                extra.setdefault("enable_weights_track", True)
                vllm_config.load_config.load_format = LOAD_FORMAT
            cls._choose_dtype(vllm_config)

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        super().check_and_update_config(vllm_config)
        model_config = vllm_config.model_config
        if model_config is None or model_config.quantization != METHOD:
            return
        load_format = vllm_config.load_config.load_format
        if load_format not in (*LOAD_FORMATS, "dummy"):
            raise CheckpointError(
                f"{model_config.model}: load format {load_format!r} does not hand over the checkpoint's own tensors. "
                f"Use --load-format {' or '.join(LOAD_FORMATS)}."
            )

    @classmethod
    def _detect(cls, vllm_config: "VllmConfig") -> None:
        """Choose the method for a checkpoint that has a description file and no `--quantization`."""
        from vllm_w4a4_plugin.quantization.source import has_description

        model_config = vllm_config.model_config
        if not has_description(model_config.model, model_config.revision):
            return
        logger.info(
            "Found %s in %s: using --quantization %s. Give --quantization to choose otherwise.",
            DESCRIPTION_FILE,
            model_config.model,
            METHOD,
        )
        model_config.quantization = METHOD
        vllm_config.quant_config = type(vllm_config)._get_quantization_config(model_config, vllm_config.load_config)

    @classmethod
    def _choose_dtype(cls, vllm_config: "VllmConfig") -> None:
        """Replace the checkpoint's 16-bit dtype by float32 where this CPU has no instructions for it.

        At this point vLLM does not tell `--dtype auto` from the same dtype given by name, hence the variable.
        """
        from vllm_w4a4_plugin.quantization.config import AscendW4A4Config

        model_config, quant_config = vllm_config.model_config, vllm_config.quant_config
        stored = getattr(model_config.hf_config, "dtype", None)
        if envs.VLLM_W4A4_KEEP_DTYPE or stored is None or model_config.dtype != stored:
            return
        if not dtypes.slow_on_this_cpu(stored) or not isinstance(quant_config, AscendW4A4Config):
            return
        extra_bytes = dtypes.cost_of_float32(quant_config.inventory.tensors.values())
        if not dtypes.affordable(extra_bytes):
            logger.warning(
                "This CPU has no %s instructions and computes it slowly. float32 would be faster, but takes %.1f GiB "
                "more memory for the unquantized layers; --dtype float32 uses it all the same.",
                str(stored).removeprefix("torch."),
                extra_bytes / 2**30,
            )
            return
        logger.info(
            "This CPU has no %s instructions: computing in float32, which takes %.0f MiB more memory for the "
            "unquantized layers. VLLM_W4A4_KEEP_DTYPE=1 keeps the checkpoint's dtype.",
            str(stored).removeprefix("torch."),
            extra_bytes / 2**20,
        )
        model_config.dtype = torch.float32
