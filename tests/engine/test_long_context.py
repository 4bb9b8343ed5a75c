# SPDX-License-Identifier: Apache-2.0
"""A prompt of 32k tokens, computed in chunks."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.engines import engine
from tests.engine.oracle import engine_logprobs, prompt_logprobs
from vllm_w4a4_plugin.constants import METHOD

LENGTH = 32768
CHUNK = 2048


@pytest.mark.engine
@pytest.mark.feature("long context: 32k tokens in chunks", flag="W4A4_LONG")
@pytest.mark.skipif(os.environ.get("W4A4_LONG") != "1", reason="minutes of CI: W4A4_LONG=1 runs it")
def test_log_probabilities_all_along(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    """Of each sixteenth of the prompt: an error that grows with the position would be in the last ones."""
    edit_json("config.json", {"max_position_embeddings": LENGTH + CHUNK})
    tokens = torch.randint(3, 500, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    with engine(
        micro_copy, quantization=METHOD, max_model_len=LENGTH + CHUNK, max_num_batched_tokens=CHUNK, max_num_seqs=1
    ) as llm:
        difference = engine_logprobs(llm, tokens) - prompt_logprobs(micro_copy, tokens)
    for part in difference.abs().chunk(16):
        assert part.median() < 0.02
