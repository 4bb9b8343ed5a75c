# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of made-up linears, opened as vLLM opens one, at any rank of a tensor-parallel group."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear

from tests.linears import open_config
from tests.quantization.linears import Linear
from vllm_w4a4_plugin.quantization.config import AscendW4A4Config


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
def all_ranks_have(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor, int], None]:
    """Pretend that these tokens are spread over so many ranks, which take part in what this rank gathers."""

    def pretend(tokens: torch.Tensor, size: int) -> None:
        from vllm_w4a4_plugin.quantization.schemes import transform, whole_tokens

        maxima = torch.cat([part.abs().amax(-1, keepdim=True).float() for part in tokens.chunk(size, -1)], -1)
        monkeypatch.setattr(transform, "tensor_model_parallel_all_gather", lambda part: tokens)
        monkeypatch.setattr(whole_tokens, "tensor_model_parallel_all_gather", lambda maximum: maxima)

    return pretend
