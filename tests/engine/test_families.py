# SPDX-License-Identifier: Apache-2.0
"""Families that `quantize` supports, served by vLLM: logits against transformers with independent fake quantization.

An engine takes half a minute, so two families with the least in common with Llama stand for all of them.
W4A4_FAMILIES=1 serves every one.
"""

import gc
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.calibration.running import quantize
from tests.families import FAMILIES, decided_rows, fake_quantized_model, logits, relative_error, write_model

SERVED: tuple[str, ...] = ("gemma2", "phi3")
if os.environ.get("W4A4_FAMILIES"):
    SERVED = tuple(name for name, family in FAMILIES.items() if family.is_served)
LARGEST_ERROR = 2e-3
VOCABULARY = 512


@pytest.mark.engine
@pytest.mark.parametrize("family", SERVED)
def test_served_logits_are_those_of_the_description(family: str, tmp_path: Path) -> None:
    calibration = torch.randint(3, VOCABULARY, (12, 64), generator=torch.Generator().manual_seed(5))
    source = write_model(family, tmp_path / "float")
    checkpoint = quantize(source, tmp_path / "quantized", calibration, "all-w4a4", distill=1)
    model, _ = fake_quantized_model(source, checkpoint)  # before the engine, which may change classes of transformers
    ids = decided_rows(model, VOCABULARY)
    expected = logits(model, ids)[:, :-1]
    error = relative_error(served_logits(checkpoint, ids), expected)
    print(f"{family}: relative error {error:.2g}")
    assert error < LARGEST_ERROR


def served_logits(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits [rows, length - 1, vocabulary] of all tokens but the last, up to a constant per token."""
    with patch.dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        llm = LLM(
            str(checkpoint),
            quantization="ascend",
            gpu_memory_utilization=0.1,
            max_model_len=128,
            max_logprobs=-1,
            dtype="float32",
            enforce_eager=True,
        )
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1)
    outputs = llm.generate([{"prompt_token_ids": row.tolist()} for row in ids], params, use_tqdm=False)
    rows = [
        [[entry[token].logprob for token in range(VOCABULARY)] for entry in output.prompt_logprobs[1:]]
        for output in outputs
    ]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return torch.tensor(rows)
