# SPDX-License-Identifier: Apache-2.0
"""Two ranks, one core each, and one rank give the same texts; weights reloaded on both ranks."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from tests.conftest import MICRO, swapped_layers
from tests.engine.engines import engine
from tests.engine.oracle import engine_logprobs, prompt_logprobs
from tests.engine.requantized import ALL_DYNAMIC, ALL_W4A4, requantize
from tests.engine.texts import greedy, prompts

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to a core of its own"),
]

TYPICAL_DIFFERENCE = 0.02
OFFSET = "model.layers.0.self_attn.q_proj.weight_offset"  # which MICRO does not have: its weights are symmetric
TOKENS = torch.randint(3, 500, (96,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPTS, LENGTH = prompts(20), 64
ALL = os.environ.get("W4A4_RANKS") == "1"


def completions(llm: LLM) -> list[list[int]]:
    return [list(text.token_ids) for text in greedy(llm, PROMPTS, LENGTH)]


def ranks_of(directory: Path, ranks: int) -> AbstractContextManager[LLM]:
    return engine(directory, quantization="ascend", tensor_parallel_size=ranks)


@pytest.mark.feature("tensor parallelism (`--tensor-parallel-size`), also on one NUMA node")
def test_the_tutorials_types_and_reloading(micro_copy: Path, edit_tensors: Callable[..., None]) -> None:
    """Also on a machine with one NUMA node, where vLLM by itself does not start two ranks."""
    edit_tensors({**swapped_layers(), OFFSET: torch.full((256, 1), 0.5)})
    with ranks_of(MICRO, 2) as llm:
        texts = completions(llm)
        first = engine_logprobs(llm, TOKENS)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(micro_copy)})
        other = engine_logprobs(llm, TOKENS)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(MICRO)})
        again = engine_logprobs(llm, TOKENS)
    assert (first - prompt_logprobs(MICRO, TOKENS)).abs().median() < TYPICAL_DIFFERENCE
    assert (other - prompt_logprobs(micro_copy, TOKENS)).abs().median() < TYPICAL_DIFFERENCE
    assert (other - first).abs().median() > 10 * TYPICAL_DIFFERENCE
    assert torch.equal(again, first)
    with ranks_of(MICRO, 1) as llm:
        assert completions(llm) == texts


@pytest.mark.skipif(not ALL, reason="four more engines, two minutes of CI: W4A4_RANKS=1 runs it")
@pytest.mark.parametrize("kinds", [ALL_W4A4, ALL_DYNAMIC], ids=["all-w4a4", "dynamic"])
def test_other_types(tmp_path: Path, kinds: dict[str, str]) -> None:
    directory = requantize(tmp_path, kinds)
    texts = []
    for ranks in (1, 2):
        with ranks_of(directory, ranks) as llm:
            texts.append(completions(llm))
    assert texts[1] == texts[0]


@pytest.mark.skipif(not ALL, reason="three more engines, a minute of CI: W4A4_RANKS=1 runs it")
def test_engines_of_one_process() -> None:
    """One after the other: an engine that speculates with n-grams, a plain one, and two ranks."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    options: list[dict[str, Any]] = [{"speculative_config": ngram}, {}, {"tensor_parallel_size": 2}]
    texts = []
    for arguments in options:
        with engine(MICRO, quantization="ascend", **arguments) as llm:
            texts.append(completions(llm))
    assert texts[1:] == texts[:1] * 2
