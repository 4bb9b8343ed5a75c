# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens: samples from everywhere in the text, without tokenizing all of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import MICRO
from vllm_w4a4_plugin.calibration.data.tokens import FEWEST_ROWS, load_tokenizer, token_rows
from vllm_w4a4_plugin.calibration.errors import CalibrationError


class WordTokenizer:
    """One token for each word, which is a number; counts the characters it is given."""

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        self.characters += len(text)
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])


def numbers(start: int, count: int) -> str:
    return " ".join(str(n) for n in range(start, start + count))


def test_token_rows_waste_almost_nothing_and_respect_the_limit() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    text = "The quick brown fox jumps over the lazy dog. " * 80
    total = len(tokenizer(text, add_special_tokens=False).input_ids)
    rows = token_rows([text], tokenizer, 300, 10**6, "t")
    assert rows.shape[1] <= 300
    assert total - rows.numel() < len(rows)
    assert 690 < token_rows([text], tokenizer, 300, 700, "t").numel() <= 700
    with pytest.raises(CalibrationError, match="too few"):
        token_rows(["short"], tokenizer, 300, 700, "t")


def test_text_within_the_limit_is_used_in_full_and_in_order() -> None:
    rows = token_rows([numbers(0, 300), numbers(300, 300)], WordTokenizer(), 60, 600, "t")
    assert rows.tolist() == torch.arange(600).view(10, 60).tolist()


def test_short_text_has_enough_rows_for_some_to_be_held_out() -> None:
    assert token_rows([numbers(0, 640)], WordTokenizer(), 512, 10**4, "t").shape == (FEWEST_ROWS, 80)


@pytest.mark.parametrize("count", [3_000, 300_000])
def test_rows_are_spread_over_a_long_text(count: int) -> None:
    """Of 3,000 tokens, which are all tokenized, and of 300,000, of which only spans are."""
    rows = token_rows([numbers(1_000_000, count)], WordTokenizer(), 64, 1024, "t", seed=1) - 1_000_000
    assert rows.shape == (16, 64)
    starts = rows[:, 1]  # a span may begin within a word
    assert torch.equal(rows[:, 1:], starts[:, None] + torch.arange(63))
    assert torch.all((starts.diff() / (count / 16) - 1).abs() < 0.02)
    assert 0 <= starts[0] < count / 16
    assert not torch.equal(
        rows + 1_000_000, token_rows([numbers(1_000_000, count)], WordTokenizer(), 64, 1024, "t", seed=2)
    )


def test_the_same_seed_gives_the_same_rows() -> None:
    first, second = (token_rows([numbers(0, 50_000)], WordTokenizer(), 64, 1024, "t", seed=4) for _ in range(2))
    assert torch.equal(first, second)


def test_of_a_large_file_only_what_is_used_is_tokenized() -> None:
    tokenizer, text = WordTokenizer(), "12345678 " * 3_000_000
    assert len(text) > 26e6
    assert token_rows([text], tokenizer, 512, 1024, "t").numel() == 1024
    assert tokenizer.characters < 40 * 1024


def test_long_words_are_read_until_there_are_enough_tokens() -> None:
    text = ("0" * 99 + "7 ") * 40_000
    rows = token_rows([text], WordTokenizer(), 64, 1024, "t")
    assert rows.shape == (16, 64)


@pytest.mark.parametrize("length", [40, 4_000])
def test_every_text_is_represented(length: int) -> None:
    """One text is a hundred times as long as the others."""
    texts = [numbers(10_000 * k, length) for k in range(12)]
    texts.insert(5, numbers(1_000_000, 100 * length))
    rows = token_rows(texts, WordTokenizer(), 64, 1024, "t")
    shares = (rows.flatten() // 10_000).bincount()
    expected = min(length, 1024 // 13)
    assert all(shares[k] >= expected - 2 for k in range(12))
    assert rows.numel() > 1000


def test_of_very_many_texts_all_regions_are_represented() -> None:
    texts = [numbers(1_000_000 + 20 * k, 20) for k in range(5_000)]
    rows = token_rows(texts, WordTokenizer(), 64, 1024, "t")
    assert rows.numel() == 1024
    regions = (rows.flatten() - 1_000_000) // (100_000 // 16)
    assert torch.all(regions.clamp_min(0).bincount(minlength=16)[:16] >= 50)


def test_a_tokenizer_that_cannot_be_loaded_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CalibrationError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
