# SPDX-License-Identifier: Apache-2.0
"""Which rows are held out, and when a text repeats itself too much to judge itself."""

import pytest
import torch

from vllm_w4a4_plugin.calibration.data.held_out import fewest_distinct, hold_out, text_warnings

VOCABULARY = 4096


@pytest.mark.parametrize(("rows", "count"), [(2, 1), (8, 1), (16, 1), (32, 2), (100, 6)])
def test_every_row_is_used_once_and_a_sixteenth_is_held_out(rows: int, count: int) -> None:
    ids = torch.randperm(VOCABULARY)[: rows * 40].view(rows, 40)
    text = hold_out(ids, VOCABULARY, 0)
    assert not text.repeats
    assert text.held_out.shape == (count, 40)
    assert torch.equal(text.ids.sort(0).values, ids.sort(0).values)
    assert text.distinct == ids.numel()
    places = [int((ids == row).all(1).nonzero()) for row in text.held_out]
    gaps = [b - a for a, b in zip([-places[0] - 1, *places], [*places, 2 * rows - places[-1]], strict=True)]
    assert max(gaps) - min(gaps) <= rows / count / 2 + 1
    assert text_warnings(text, "t") == []


def test_a_single_row_is_not_held_out() -> None:
    text = hold_out(torch.arange(512)[None], VOCABULARY, 0)
    assert (len(text.rows), len(text.held_out)) == (1, 0)


@pytest.mark.parametrize("distinct", [1, 10, 60])
def test_text_that_repeats_itself_is_judged_by_random_tokens(distinct: int) -> None:
    ids = (torch.arange(32 * 64) % distinct).view(32, 64)
    text = hold_out(ids, VOCABULARY, 3)
    assert text.repeats
    assert torch.equal(text.rows, ids)
    assert text.held_out.shape == (2, 64)
    assert len(text.held_out.unique()) > 100
    assert torch.equal(text.held_out, hold_out(ids, VOCABULARY, 3).held_out)
    (warning,) = text_warnings(text, "novel.txt")
    assert warning.startswith(f"novel.txt: only {distinct} different token")


def test_ordinary_text_of_any_length_does_not_repeat_itself() -> None:
    """Text has about 3 N^0.6 different tokens among N, or more (Heaps' law for a small vocabulary of subwords)."""
    for tokens in (512, 2048, 8192, 16384, 65536, 10**6):
        assert fewest_distinct(tokens, 32000) <= 3 * tokens**0.6
    assert fewest_distinct(16384, 512) == 128
