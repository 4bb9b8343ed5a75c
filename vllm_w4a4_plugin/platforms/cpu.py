# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform, with what W4A4 checkpoints need before their weights are loaded."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.platforms.cpu import CpuPlatform

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.saved_state import read_saved_state
from vllm_w4a4_plugin.constants import (
    DESCRIPTION_FILE,
    LOAD_FORMAT,
    LOGGER,
    METHOD,
    PROVIDER,
    SAVED_LOAD_FORMAT,
    SAVED_STATE_FILE,
    STREAMED_LOAD_FORMAT,
)

from . import dtype as dtypes
from . import eager, executor, onednn, requested_dtype, triton_kernels
from .registration import register_method
from .threads import bind_ranks

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser

logger = logging.getLogger(LOGGER)

TRACED_VARIABLES = {"VLLM_W4A4_ACTIVATION_BITS": 4, "VLLM_W4A4_LOCAL_SCALES": False}
"""Variables on which compiled graphs depend, with their defaults."""

LOAD_FORMATS = {
    **dict.fromkeys(("auto", "hf", "safetensors", LOAD_FORMAT), LOAD_FORMAT),
    **dict.fromkeys(("runai_streamer", STREAMED_LOAD_FORMAT), STREAMED_LOAD_FORMAT),
    **dict.fromkeys(("sharded_state", SAVED_LOAD_FORMAT), SAVED_LOAD_FORMAT),
}
"""Load formats of vLLM that can be used, and ours that replaces each."""

WHY_REFUSED = {
    "fastsafetensors": "vLLM's loader for it puts tensors on a CUDA device, which a CPU does not have",
}

WORKER = "vllm_w4a4_plugin.platforms.worker.W4A4CpuWorker"
COMMUNICATOR = "vllm_w4a4_plugin.platforms.communicator.NodeAwareCpuCommunicator"
ADAPTERS = "vllm_w4a4_plugin.platforms.adapters.AdaptersOnCpu"


class W4A4CpuPlatform(CpuPlatform):
    """Adds the choice `--quantization ascend`, detects checkpoints without it, and checks the configuration early."""

    ray_device_key = "GPU"
    """The resource of Ray that each rank takes one of. vLLM asks for its number, and Ray numbers only accelerators."""

    @classmethod
    def pre_register_and_update(cls, parser: "FlexibleArgumentParser | None" = None) -> None:
        super().pre_register_and_update(parser)
        register_method()
        requested_dtype.observe()
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
            # By default, vLLM checks only for unquantized models that every parameter was loaded.
            extra = vllm_config.load_config.model_loader_extra_config
            if vllm_config.load_config.load_format in LOAD_FORMATS and isinstance(extra, dict):
                ours = LOAD_FORMATS[vllm_config.load_config.load_format]
                if ours != SAVED_LOAD_FORMAT:
                    extra.setdefault("enable_weights_track", True)
                vllm_config.load_config.load_format = ours
            cls._choose_dtype(vllm_config)
            eager.prefer_eager(vllm_config)

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return COMMUNICATOR

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return ADAPTERS

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        triton_kernels.expect_any_object()
        super().register_triton_kernel_overrides()

    @classmethod
    def import_ir_kernels(cls) -> None:
        super().import_ir_kernels()
        eager.register_kernels()

    @classmethod
    def _is_ours(cls, vllm_config: "VllmConfig") -> bool:
        model_config = vllm_config.model_config
        return model_config is not None and model_config.quantization == METHOD

    @classmethod
    def opaque_attention_op(cls) -> bool:
        """Whether attention is called as an operator of torch's, which costs as much as a small model's attention."""
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        return config is None or not cls._is_ours(config) or not eager.is_eager(config)

    @classmethod
    def get_default_ir_op_priority(cls, vllm_config: "VllmConfig") -> "IrOpPriorityConfig":
        priority = super().get_default_ir_op_priority(vllm_config)
        if cls._is_ours(vllm_config) and eager.is_eager(vllm_config) and eager.have_kernels():
            for operator in eager.OPERATORS:
                getattr(priority, operator).insert(0, PROVIDER)
        return priority

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        parallel_config, model_config = vllm_config.parallel_config, vllm_config.model_config
        is_ours = cls._is_ours(vllm_config)
        if (is_ours or parallel_config.pipeline_parallel_size > 1) and parallel_config.worker_cls == "auto":
            parallel_config.worker_cls = WORKER
        computes_in_engine = is_ours and executor.is_one_process_possible(vllm_config)
        executor.forget_last_engine()
        super().check_and_update_config(vllm_config)
        bind_ranks(parallel_config, is_ours)
        if computes_in_engine and parallel_config.distributed_executor_backend == executor.PROCESS_PER_RANK:
            executor.bind_this_engine(vllm_config)
        if parallel_config.distributed_executor_backend == "ray":
            logger.info(
                "Each rank takes one GPU of Ray's resources, which stands for a share of the cores: start Ray with "
                "`ray start --num-gpus=N` for N ranks on the node."
            )
        if not is_ours:
            return
        onednn.bound_cache()
        load_format = vllm_config.load_config.load_format
        if load_format not in (*LOAD_FORMATS, "dummy"):
            reason = WHY_REFUSED.get(load_format, "it does not load the checkpoint's own tensors")
            raise CheckpointError(
                f"{model_config.model}: load format {load_format!r} cannot be used here: {reason}. "
                "Use --load-format auto, safetensors or runai_streamer."
            )
        cls._check_saved_state(vllm_config)
        cls._tell_compile_cache(vllm_config)

    @classmethod
    def _check_saved_state(cls, vllm_config: "VllmConfig") -> None:
        """Is there a sharded state to be loaded where one is asked for, and only there, and does it fit the options?"""
        model = vllm_config.model_config.model
        is_wanted = vllm_config.load_config.load_format == SAVED_LOAD_FORMAT
        state = read_saved_state(Path(model))
        if state is None:
            if is_wanted:
                raise CheckpointError(f"{model}: has no sharded state ({SAVED_STATE_FILE}): save one first.")
            return
        if not is_wanted:
            raise CheckpointError(
                f"{model}: has a sharded state ({SAVED_STATE_FILE}): use --load-format sharded_state."
            )
        from vllm_w4a4_plugin.quantization.loading.sharded_state import settings

        state.check_settings(model, settings(vllm_config))

    @classmethod
    def _tell_compile_cache(cls, vllm_config: "VllmConfig") -> None:
        """Let vLLM's cache of compiled graphs tell graphs apart in which variables of ours are constants.

        The key of the cache has no variables of plugins, but it has `additional_config`.
        """
        constants = {
            name: value for name, default in TRACED_VARIABLES.items() if (value := getattr(envs, name)) != default
        }
        if not constants:
            return
        if not isinstance(vllm_config.additional_config, dict):
            name, value = next(iter(constants.items()))
            raise CheckpointError(
                f"{name}={int(value)} needs a dictionary as additional_config, found "
                f"{type(vllm_config.additional_config).__name__}."
            )
        vllm_config.additional_config = {**vllm_config.additional_config, **constants}

    @classmethod
    def _detect(cls, vllm_config: "VllmConfig") -> None:
        """Choose the method if the checkpoint has a description file and `--quantization` was not given."""
        from vllm_w4a4_plugin.quantization.source import has_description

        model_config = vllm_config.model_config
        if not has_description(model_config.model, model_config.revision):
            return
        logger.info(
            "Found %s in %s: using --quantization %s. Pass --quantization to choose another method.",
            DESCRIPTION_FILE,
            model_config.model,
            METHOD,
        )
        model_config.quantization = METHOD
        vllm_config.quant_config = type(vllm_config)._get_quantization_config(model_config, vllm_config.load_config)

    @classmethod
    def _choose_dtype(cls, vllm_config: "VllmConfig") -> None:
        """Choose float32 in place of a 16-bit dtype that this CPU has no instructions for, unless it was named."""
        from vllm_w4a4_plugin.quantization.config import AscendW4A4Config

        model_config, quant_config = vllm_config.model_config, vllm_config.quant_config
        if not requested_dtype.was_automatic(model_config.hf_config):
            return
        if not dtypes.slow_on_this_cpu(model_config.dtype) or not isinstance(quant_config, AscendW4A4Config):
            return
        extra_bytes = dtypes.cost_of_float32(quant_config.inventory.tensors.values())
        if not dtypes.affordable(extra_bytes):
            logger.warning(
                "This CPU has no %s instructions, so the unquantized layers are slow. In float32 they would be faster "
                "but take %.1f GiB more memory, which may be too much here; --dtype float32 uses it anyway.",
                str(model_config.dtype).removeprefix("torch."),
                extra_bytes / 2**30,
            )
            return
        logger.info(
            "This CPU has no %s instructions: using float32, in which the unquantized layers take %.0f MiB more "
            "memory. --dtype names another.",
            str(model_config.dtype).removeprefix("torch."),
            extra_bytes / 2**20,
        )
        model_config.dtype = torch.float32
