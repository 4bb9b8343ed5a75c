# SPDX-License-Identifier: Apache-2.0
"""Families that `quantize` supports, served by vLLM: logits against transformers with independent fake quantization.

An engine takes half a minute, so three families with the least in common with Llama stand for all of them.
W4A4_FAMILIES=1 serves every one.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.calibration.running import quantize
from tests.engine.test_vision import IMAGE, log_probabilities, picture, served
from tests.families import (
    FAMILIES,
    decided_rows,
    fake_quantized_model,
    load_fake_quantized,
    logits,
    relative_error,
    write_model,
)
from tests.vision import MODELS, WORDS, new_model, published_name, write_float_model

ALL = bool(os.environ.get("W4A4_FAMILIES"))
SERVED = [name for name, family in FAMILIES.items() if family.is_served] if ALL else ["gemma2", "phi3", "qwen2_moe"]
LARGEST_ERROR = 2e-3


@pytest.mark.engine
@pytest.mark.parametrize("family", SERVED)
def test_served_logits_are_those_of_the_description(family: str, tmp_path: Path) -> None:
    calibration = torch.randint(3, 512, (12, 64), generator=torch.Generator().manual_seed(5))
    source = write_model(family, tmp_path / "float")
    checkpoint = quantize(source, tmp_path / "quantized", calibration, "all-w4a4", distill=1)
    model, _ = fake_quantized_model(source, checkpoint)  # before the engine, which may change classes of transformers
    ids = decided_rows(model, 512)
    expected = logits(model, ids)[:, :-1]
    with engine(checkpoint) as llm:
        error = relative_error(served_logits(llm, ids, expected.shape[-1]), expected)
    print(f"{family}: relative error {error:.2g}")
    assert error < LARGEST_ERROR


@pytest.mark.engine
@pytest.mark.skipif(not ALL, reason="W4A4_FAMILIES is not set")
@pytest.mark.parametrize("name", MODELS)
def test_vision_language_models_are_served_with_text_and_images(name: str, tmp_path: Path) -> None:
    calibration = torch.randint(3, WORDS, (12, 64), generator=torch.Generator().manual_seed(5))
    source, checkpoint = tmp_path / "float", tmp_path / "quantized"
    write_float_model(name, source)
    quantize(source, checkpoint, calibration, "all-w4a4", distill=1)
    model = new_model(name)
    load_fake_quantized(model, source, checkpoint, partial(published_name, name))
    ids = decided_rows(model, WORDS)
    expected = logits(model, ids)[:, :-1]
    pictures = [picture(1), picture(2)]
    with engine(checkpoint) as llm:
        error = relative_error(served_logits(llm, ids, expected.shape[-1]), expected)
        answers = [served(llm, IMAGE, image) for image in pictures]
    differences = [
        (found - log_probabilities(model, checkpoint, tokens, IMAGE, image)).abs().max().item()
        for (tokens, found), image in zip(answers, pictures, strict=True)
    ]
    print(f"{name}: relative error {error:.2g}; log probabilities after images differ by {differences}")
    assert error < LARGEST_ERROR
    assert max(differences) < 1e-3
    tokens, found = answers[0]
    assert (found - log_probabilities(model, checkpoint, tokens, IMAGE, pictures[1])).abs().max() > 0.1


@contextmanager
def engine(checkpoint: Path) -> Iterator[LLM]:
    """An engine in this process that serves a checkpoint in float32."""
    with patch.dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        llm = LLM(
            str(checkpoint),
            quantization="ascend",
            gpu_memory_utilization=0.1,
            max_model_len=256,
            max_logprobs=-1,
            dtype="float32",
            enforce_eager=True,
        )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def served_logits(llm: LLM, ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Logits [rows, length - 1, vocabulary] of all tokens but the last, up to a constant per token."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1)
    outputs = llm.generate([{"prompt_token_ids": row.tolist()} for row in ids], params, use_tqdm=False)
    rows = [
        [[entry[token].logprob for token in range(vocabulary)] for entry in output.prompt_logprobs[1:]]
        for output in outputs
    ]
    return torch.tensor(rows)
