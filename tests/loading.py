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
def distributed(config: VllmConfig) -> Iterator[None]:
    """The configuration in force, in a process that is its own tensor-parallel group."""
    with set_current_vllm_config(config):
        try:
            init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
            ensure_model_parallel_initialized(1, 1, backend="gloo")
            yield
        finally:
            cleanup_dist_env_and_memory()


@contextmanager
def loaded_model(directory: Path, **arguments: Any) -> Iterator[torch.nn.Module]:
    """A checkpoint loaded by vLLM's own loader."""
    config = engine_config(directory, **arguments)
    # vLLM's loader empties the accelerator's cache; its CPU worker, absent here, takes care that there is one.
    with patch("torch.accelerator.empty_cache"), distributed(config):
        yield get_model(vllm_config=config)
