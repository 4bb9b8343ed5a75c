# SPDX-License-Identifier: Apache-2.0
"""Text that the model generates: from its own distribution, without special tokens, the same for the same seed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_w4a4_plugin.calibration.data import self_generated_text
from vllm_w4a4_plugin.calibration.data.self_generated_text import TextRequest, generate_text


def test_same_seed_same_text(float_model: Callable[..., Path]) -> None:
    directory = float_model("qwen3")
    text = generate_text(directory, TextRequest(3, 20, 7))
    assert text.shape == (3, 20)
    assert torch.equal(text, generate_text(directory, TextRequest(3, 20, 7)))
    assert not torch.equal(text, generate_text(directory, TextRequest(3, 20, 8)))


def test_no_special_tokens_and_progress(float_model: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    directory = float_model("qwen3")
    seen: list[int] = []
    text = generate_text(directory, TextRequest(50, 12, 0), progress=seen.append)
    assert not set(text.flatten().tolist()) & set(AutoTokenizer.from_pretrained(directory).all_special_ids)
    assert seen == [50 * count for count in range(2, 13)]


def test_many_rows_are_generated_some_at_a_time(
    float_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = float_model("qwen3")
    seen: list[int] = []
    monkeypatch.setattr(self_generated_text, "ROWS_AT_ONCE", 2)
    text = generate_text(directory, TextRequest(5, 6, 0), progress=seen.append)
    assert torch.equal(text, generate_text(directory, TextRequest(5, 6, 0)))
    assert seen == sorted(set(seen))
    assert seen[-1] == text.numel()
    assert len({tuple(row) for row in text.tolist()}) == 5
    # First tokens do not depend on what follows.
    monkeypatch.setattr(self_generated_text, "ROWS_AT_ONCE", 5)
    assert torch.equal(text[:, 0], generate_text(directory, TextRequest(5, 6, 0))[:, 0])


def test_second_token_follows_the_models_distribution(float_model: Callable[..., Path]) -> None:
    """Unlikely tokens included: frequencies against the mean of the model's own probabilities."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = float_model("qwen3")
    text = generate_text(directory, TextRequest(20_000, 2, 3))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        logits = model(input_ids=text[:, :1]).logits[:, 0, : len(tokenizer)]
    logits[:, tokenizer.all_special_ids] = float("-inf")
    expected = logits.softmax(-1).mean(0)
    found = text[:, 1].bincount(minlength=len(tokenizer)) / len(text)
    unlikely = expected < expected.sort().values[expected.sort().values.cumsum(0) < 0.05].max()
    assert abs(found[unlikely].sum() - expected[unlikely].sum()) < 0.01
    # The expected distance of a sample of this size is below the square root of its classes over its size.
    assert (found - expected).abs().sum() < (len(tokenizer) / len(text)) ** 0.5


def test_tokens_that_only_the_tokenizer_knows_are_not_generated(float_model: Callable[..., Path]) -> None:
    """The tokenizer has 512 tokens, the model 64."""
    text = generate_text(float_model("llama", vocab_size=64), TextRequest(40, 6, 0), vocabulary=64)
    assert text.max() < 64
    assert len(text.unique()) > 32
