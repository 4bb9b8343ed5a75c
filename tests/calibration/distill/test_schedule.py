# SPDX-License-Identifier: Apache-2.0
"""How long training takes, and on which rows."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_w4a4_plugin.calibration.distill.schedule import Schedule, default_steps, shorter_rows


@pytest.mark.parametrize(("layers", "steps"), [(24, 16), (240, 0)])
def test_large_models_are_not_distilled_by_default(layers: int, steps: int) -> None:
    config = SimpleNamespace(
        hidden_size=896,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
    )
    assert default_steps(config) == steps


def test_no_row_is_repeated_before_all_have_been_used() -> None:
    rows = Schedule(11, seed=3).rows(4).tolist()
    assert [sorted(rows[:4]), sorted(rows[4:8])] == [[0, 1, 2, 3]] * 2
    assert len(set(rows[8:])) == 3
    assert rows != Schedule(11, seed=4).rows(4).tolist()


def test_rates_rise_and_fall() -> None:
    factors = [Schedule(40, 0).factor(step) for step in range(40)]
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert max(factors[0], factors[-1]) < 0.2 < 0.8 < factors[peak] <= 1


@given(st.integers(1, 4), st.integers(1, 700), st.integers(1, 300))
def test_shorter_rows_are_parts_of_the_rows(rows: int, width: int, length: int) -> None:
    ids = torch.arange(rows * width).view(rows, width)
    cut = shorter_rows(ids, length)
    assert cut.shape[1] <= length
    assert len(cut) % rows == 0
    left_out = width - len(cut) // rows * cut.shape[1]
    assert 0 <= left_out < len(cut) // rows
    assert torch.equal(cut.reshape(rows, -1), ids[:, : width - left_out])
