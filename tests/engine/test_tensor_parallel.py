# SPDX-License-Identifier: Apache-2.0
"""Two ranks, one core each, on the checkpoint of the real tool, and weights reloaded on both."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm import LLM

from tests.conftest import MICRO, swapped_layers
from tests.engine.oracle import engine_logprobs, prompt_logprobs

pytestmark = pytest.mark.engine

BOUND = 0.15
OFFSET = "model.layers.0.self_attn.q_proj.weight_offset"  # which MICRO does not have: its weights are symmetric
TOKENS = torch.randint(3, 500, (96,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_ranks(micro_copy: Path, edit_tensors: Callable[..., None]) -> None:
    """Each rank quantizes its part of o_proj's int8 activations with a scale of its own, hence the wider bound.

    Also on a machine with one NUMA node, where vLLM by itself does not start two ranks.
    """
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
    edit_tensors({**swapped_layers(), OFFSET: torch.full((256, 1), 0.5)})
    try:
        first = engine_logprobs(llm, TOKENS)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(micro_copy)})
        other = engine_logprobs(llm, TOKENS)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(MICRO)})
        again = engine_logprobs(llm, TOKENS)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    assert (first - prompt_logprobs(MICRO, TOKENS)).abs().median() < BOUND
    assert (other - prompt_logprobs(micro_copy, TOKENS)).abs().median() < BOUND
    assert (other - first).abs().median() > 2 * BOUND
    assert torch.equal(again, first)
