# SPDX-License-Identifier: Apache-2.0
"""A checkpoint loaded by vLLM's real loader into the real layers of vllm-ascend, on the stand-in."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model


def engine_config(directory: Path, **arguments: Any) -> VllmConfig:
    """vLLM's configuration for a checkpoint, as `vllm serve` makes it; weights go to the CPU, where the stand-in is."""
    defaults = {"max_model_len": 128, "enforce_eager": True, "dtype": "bfloat16", "quantization": "ascend"}
    config = EngineArgs(model=str(directory), **{**defaults, **arguments}).create_engine_config()
    config.load_config.device = "cpu"
    return config


@contextmanager
def distributed(config: VllmConfig) -> Iterator[None]:
    """One process that is its own tensor-parallel group, with vllm-ascend's layers in place of vLLM's."""
    from vllm_ascend.utils import register_ascend_customop

    with set_current_vllm_config(config):
        try:
            register_ascend_customop(config)
            init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
            ensure_model_parallel_initialized(1, 1, backend="gloo")
            yield
        finally:
            cleanup_dist_env_and_memory()


@contextmanager
def loaded_model(directory: Path, **arguments: Any) -> Iterator[torch.nn.Module]:
    """The loaded model."""
    config = engine_config(directory, **arguments)
    with distributed(config):
        yield get_model(vllm_config=config)


@cache
def run_operators_on_cpu() -> None:
    """Let our operators, which are registered for NPUs, take the stand-in's tensors."""
    from vllm_w4a4_plugin.ops.npu import cann, fused

    cann.register_kernels("CPU")
    fused.register_kernel("CPU")
