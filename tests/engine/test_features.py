# SPDX-License-Identifier: Apache-2.0
"""Features of vLLM that need an engine of their own: pipelines and draft models."""

import os
import re

import pytest
import torch
from vllm import SamplingParams

from tests.conftest import MICRO
from tests.engine.engines import engine
from tests.engine.oracle import engine_logprobs, prompt_logprobs
from tests.engine.texts import NUMBER, greedy, structured_number
from vllm_w4a4_plugin.constants import METHOD

pytestmark = pytest.mark.engine

TOKENS = torch.randint(3, 500, (96,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.feature("structured output: outlines")
@pytest.mark.feature("pipeline parallelism (`--pipeline-parallel-size`), eager")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to a core of its own")
def test_pipeline() -> None:
    """In eager mode, where vLLM by itself does not allocate what the second stage receives into."""
    with engine(
        MICRO, quantization=METHOD, pipeline_parallel_size=2, structured_outputs_config={"backend": "outlines"}
    ) as llm:
        number = structured_number(llm)
        difference = engine_logprobs(llm, TOKENS) - prompt_logprobs(MICRO, TOKENS)
    assert difference.abs().median() < 0.02
    assert re.fullmatch(NUMBER, number)


@pytest.mark.feature("speculative decoding: draft model")
def test_draft_model() -> None:
    """The draft is the model itself, read a second time: all that it proposes is accepted."""
    draft = {"model": str(MICRO), "method": "draft_model", "num_speculative_tokens": 3}
    with engine(MICRO, quantization=METHOD, speculative_config=draft, disable_log_stats=False) as llm:
        llm.generate([{"prompt_token_ids": TOKENS}], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    proposed = counts["vllm:spec_decode_num_draft_tokens"]
    assert proposed >= 9
    assert counts["vllm:spec_decode_num_accepted_tokens"] == proposed


@pytest.mark.feature("structured output: guidance")
@pytest.mark.feature("speculative decoding: n-gram")
def test_ngram() -> None:
    """Tokens are those without speculation, and some proposals are accepted: the prompt repeats itself."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    repeating = [TOKENS[:12] * 4, TOKENS[:6] * 8]
    with engine(
        MICRO,
        quantization=METHOD,
        speculative_config=ngram,
        structured_outputs_config={"backend": "guidance"},
        disable_log_stats=False,
    ) as llm:
        found = greedy(llm, repeating, 48)
        number = structured_number(llm)
        counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    assert re.fullmatch(NUMBER, number)
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0
    for prompt, completion in zip(repeating, found, strict=True):
        logprobs = [e[t].logprob for e, t in zip(completion.logprobs, completion.token_ids, strict=True)]
        expected = prompt_logprobs(MICRO, prompt + list(completion.token_ids))[-48:]
        assert (torch.tensor(logprobs) - expected).abs().median() < 0.02
        assert all(entry[t].rank == 1 for entry, t in zip(completion.logprobs, completion.token_ids, strict=True))
