# SPDX-License-Identifier: Apache-2.0
"""A checkpoint loaded by vLLM's real loader into the real layers of vllm-ascend, on the stand-in."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import get_model

from tests import loading


def engine_config(directory: Path, **arguments: Any) -> VllmConfig:
    """vLLM's configuration for a checkpoint, as `vllm serve` makes it; weights go to the CPU, where the stand-in is."""
    config = loading.engine_config(directory, **arguments)
    config.load_config.device = "cpu"
    return config


@contextmanager
def distributed(config: VllmConfig) -> Iterator[None]:
    """The configuration in force, in a process of its own group, with vllm-ascend's layers in place of vLLM's."""
    from vllm_ascend.utils import register_ascend_customop

    with set_current_vllm_config(config):
        register_ascend_customop(config)
    with loading.distributed(config):
        yield


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
