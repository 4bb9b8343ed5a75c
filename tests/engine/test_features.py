# SPDX-License-Identifier: Apache-2.0
"""Features of vLLM that need an engine of their own: pipelines and draft models."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.conftest import MICRO
from tests.engine.oracle import engine_logprobs, prompt_logprobs
from vllm_w4a4_plugin.constants import METHOD

pytestmark = pytest.mark.engine

TOKENS = torch.randint(3, 500, (96,), generator=torch.Generator().manual_seed(0)).tolist()


@contextmanager
def engine(directory: Path, **arguments: Any) -> Iterator[LLM]:
    llm = LLM(
        str(directory),
        max_model_len=128,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.2,
        disable_log_stats=False,
        **arguments,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_pipeline() -> None:
    """In eager mode, where vLLM by itself does not allocate what the second stage receives into."""
    with engine(MICRO, quantization=METHOD, pipeline_parallel_size=2) as llm:
        difference = engine_logprobs(llm, TOKENS) - prompt_logprobs(MICRO, TOKENS)
    assert difference.abs().median() < 0.02


def test_draft_model() -> None:
    """The draft is the model itself, read a second time: all that it proposes is accepted."""
    draft = {"model": str(MICRO), "method": "draft_model", "num_speculative_tokens": 3}
    with engine(MICRO, quantization=METHOD, speculative_config=draft) as llm:
        llm.generate([{"prompt_token_ids": TOKENS}], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    proposed = counts["vllm:spec_decode_num_draft_tokens"]
    assert proposed >= 9
    assert counts["vllm:spec_decode_num_accepted_tokens"] == proposed
