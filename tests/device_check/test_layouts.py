# SPDX-License-Identifier: Apache-2.0
"""What a permutation is called; the expected names are those of permutations made here by moving arrays."""

import numpy as np
import pytest

from vllm_w4a4_plugin.device_check.layouts import LOST, cyclic, describe

LEFT, RIGHT = 4, 8
GRID = np.arange(LEFT * RIGHT).reshape(LEFT, RIGHT)


def positions(arranged: np.ndarray) -> list[int]:
    """Where each input is in an array of inputs."""
    return np.argsort(arranged.ravel()).tolist()


def test_cyclic_shifts() -> None:
    assert cyclic(LEFT, RIGHT) == list(range(32))
    assert cyclic(LEFT, RIGHT, 1, 0) == positions(np.roll(GRID, 1, 0))
    assert cyclic(LEFT, RIGHT, 0, -1) == positions(np.roll(GRID, -1, 1))


@pytest.mark.parametrize(
    ("arranged", "steps", "name"),
    [
        (GRID.reshape(-1, 2)[:, ::-1], (0, 0), "the two int4 values of each byte are swapped"),
        (GRID[:, ::-1], (0, 0), "the int4 values of each 32-bit word are reversed"),
        (np.roll(GRID, -1, 0), (1, 0), "left_trans acts as its transpose"),
        (np.roll(GRID, -1, 1), (0, 1), "right_trans acts as its transpose"),
        (GRID, (1, 0), "left_trans has no effect"),
        (GRID, (0, 1), "right_trans has no effect"),
        (GRID.T, (0, 0), "unknown layout"),
    ],
)
def test_mistakes_have_names(arranged: np.ndarray, steps: tuple[int, int], name: str) -> None:
    text = describe(positions(arranged), cyclic(LEFT, RIGHT, *steps), LEFT, RIGHT, steps)
    assert text.startswith(f"{name}: ")


def test_what_is_right_or_lost() -> None:
    expected = list(range(32))
    assert describe(expected, expected, LEFT, RIGHT, (0, 0)) == ""
    text = describe([LOST, *expected[1:]], expected, LEFT, RIGHT, (0, 0))
    assert text.startswith("unknown layout: 1 of 32 inputs come out elsewhere; inputs 0, 1, 2, ... are at ? 1 2 ")
