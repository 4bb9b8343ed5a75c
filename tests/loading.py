# SPDX-License-Identifier: Apache-2.0
"""vLLM's real model loading inside the test's own process, without an engine around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

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
    """vLLM's configuration for a checkpoint; raises what `vllm serve` would raise before it loads weights."""
    defaults = {"max_model_len": 128, "enforce_eager": True, "dtype": "bfloat16", "quantization": "ascend"}
    return EngineArgs(model=str(directory), **{**defaults, **arguments}).create_engine_config()


@contextmanager
def distributed(config: VllmConfig, rank: int = 0, port: int = 0) -> Iterator[None]:
    """The configuration in force in one process of a tensor-parallel group, by default the only one."""
    ranks = config.parallel_config.tensor_parallel_size
    with set_current_vllm_config(config):
        try:
            init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
            ensure_model_parallel_initialized(ranks, 1, backend="gloo")
            yield
        finally:
            cleanup_dist_env_and_memory()


@contextmanager
def loaded_model(directory: Path, rank: int = 0, port: int = 0, **arguments: Any) -> Iterator[torch.nn.Module]:
    """A checkpoint loaded by vLLM's own loader, as rank `rank` of a group that meets at `port`."""
    config = engine_config(directory, **arguments)
    # vLLM's loader empties the accelerator's cache; its CPU worker, absent here, takes care that there is one.
    with patch("torch.accelerator.empty_cache"), distributed(config, rank, port):
        yield get_model(vllm_config=config)
