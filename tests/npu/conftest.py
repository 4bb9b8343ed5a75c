# SPDX-License-Identifier: Apache-2.0
"""These tests run inside vllm-ascend, on the stand-in for torch_npu: `make test-npu`, platforms/test_vllm_ascend.py."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tools.npu_environment import MARK

# Imported without vllm-ascend, too; whatever needs it is imported by the fixtures.
if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

    from tests.npu.linears import Linear

collect_ignore_glob = [] if MARK in os.environ else ["test_*.py"]

PRELOADED = ["tests.npu.preloaded"]


@pytest.fixture(scope="session")
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    """Runs each function in a process that has imported vLLM, with vllm-ascend as platform, and no more."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
        yield pool


@pytest.fixture(scope="module")
def config() -> "Iterator[VllmConfig]":
    """vLLM's configuration for the micro checkpoint, in force, with our operators on the stand-in's tensors."""
    from tests.npu.loading import distributed, engine_config, run_operators_on_cpu
    from tests.npu.processes import MICRO

    config = engine_config(MICRO)
    with distributed(config):
        run_operators_on_cpu()
        yield config


@pytest.fixture(scope="module")
def model(config: "VllmConfig") -> "torch.nn.Module":
    """The micro checkpoint, loaded."""
    from vllm.model_executor.model_loader import get_model

    return get_model(vllm_config=config)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Names and keyword arguments of the operators called."""
    import torch_npu

    seen: list[tuple[str, Any]] = []

    def watched(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append((name, kwargs))
            return operator(*args, **kwargs)

        return call

    for name in ("npu_kronecker_quant", "npu_dynamic_quant", "npu_quant_matmul", "npu_convert_weight_to_int4pack"):
        monkeypatch.setattr(torch_npu, name, watched(name, getattr(torch_npu, name)))
    return seen


@pytest.fixture
def column(tmp_path: Path) -> Callable[..., Any]:
    """A loaded column-parallel layer `mlp.up` with one linear."""

    def make(linear: "Linear", **arguments: Any) -> Any:
        import torch
        from vllm_ascend.ops.linear import AscendColumnParallelLinear

        from tests.linears import load
        from tests.npu.linears import open_config

        layer = AscendColumnParallelLinear(
            linear.features,
            linear.out,
            bias=linear.bias,
            quant_config=open_config(tmp_path, {"mlp.up": linear}),
            prefix="model.layers.0.mlp.up",
            **{"params_dtype": torch.bfloat16, **arguments},
        )
        return load(layer, {None: linear})

    return make
