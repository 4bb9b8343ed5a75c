# SPDX-License-Identifier: Apache-2.0
"""Two ranks, one core each, on the checkpoint of the real tool."""

import gc
import os

import pytest
import torch
from vllm import LLM

from tests.conftest import MICRO
from tests.engine.oracle import engine_logprobs, prompt_logprobs

pytestmark = pytest.mark.engine

TOKENS = torch.randint(3, 500, (96,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank quantizes its part of o_proj's int8 activations with a scale of its own, hence the wider bound."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")
    llm = LLM(
        str(MICRO),
        quantization="ascend",
        max_model_len=128,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        tensor_parallel_size=2,
        gpu_memory_utilization=0.3,
    )
    difference = engine_logprobs(llm, TOKENS) - prompt_logprobs(MICRO, TOKENS)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    assert difference.abs().median() < 0.15
