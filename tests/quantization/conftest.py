# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of made-up linears, opened as vLLM opens one, at any rank of a tensor-parallel group."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear

from tests.linears import open_config
from tests.quantization.linears import Linear
from vllm_w4a4_plugin.quantization.config import AscendW4A4Config

OutputsOfRanks = Callable[[Callable[[], Any], torch.Tensor, int], list[torch.Tensor]]
"""(what builds a rank's row-parallel layer, whole tokens, number of ranks) -> output of each rank before the sum."""


@pytest.fixture
def vllm_context() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., AscendW4A4Config]:
    """Write the linears as a checkpoint directory and open it as vLLM does."""

    def make(**linears: Linear) -> AscendW4A4Config:
        return open_config(AscendW4A4Config(), tmp_path, {f"m.{name}": linear for name, linear in linears.items()})

    return make


@pytest.fixture
def at_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend to be a rank of a tensor-parallel group."""

    def pretend(rank: int, size: int) -> None:
        from vllm.model_executor import parameter

        for module in (vllm_linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        from vllm_w4a4_plugin.quantization import report

        monkeypatch.setattr(report, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(vllm_linear, "tensor_model_parallel_all_reduce", lambda x: x)

    pretend(0, 1)
    return pretend


@pytest.fixture
def outputs_of_ranks(at_rank: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> OutputsOfRanks:
    """What each rank of a group gives for its part of some tokens; what ranks gather comes from all of them."""

    def compute(build: Callable[[], Any], x: torch.Tensor, size: int) -> list[torch.Tensor]:
        from vllm_w4a4_plugin.quantization import float_linear
        from vllm_w4a4_plugin.quantization.schemes import base, whole_tokens

        own, sent = threading.local(), [torch.empty(0)] * size
        barrier = threading.Barrier(size, timeout=60)
        # One rank computes at a time: layers of equal sizes share a primitive of oneDNN in vLLM's cache, which keeps
        # the addresses of the layer that it computes for.
        turn = threading.Lock()

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            sent[own.rank] = tensor
            turn.release()
            try:
                barrier.wait()
                gathered = torch.cat(sent, -1)
                barrier.wait()
            finally:
                turn.acquire()
            return gathered

        for module in (base, float_linear, whole_tokens):
            monkeypatch.setattr(module, "tensor_model_parallel_all_gather", gather)

        def run(rank: int) -> torch.Tensor:
            own.rank = rank
            try:
                with turn:
                    return layers[rank](x.chunk(size, -1)[rank].contiguous())[0]
            except Exception:
                barrier.abort()
                raise

        layers = []
        for rank in range(size):
            at_rank(rank, size)
            layers.append(build())
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(run, range(size)))

    return compute
