# SPDX-License-Identifier: Apache-2.0
"""Where one-hot inputs came out, and what kind of mistake moves them there. Pure logic on lists of positions."""

from collections.abc import Sequence

SHOWN = 16
"""Positions of a permutation that are shown."""

LOST = -1
"""In a permutation: the input came out nowhere, or in several places."""


def cyclic(left: int, right: int, left_step: int = 0, right_step: int = 0) -> list[int]:
    """Where input m * right + n goes if factors shift its rows and columns cyclically."""
    return [(m + left_step) % left * right + (n + right_step) % right for m in range(left) for n in range(right)]


def after(first: Sequence[int], then: Sequence[int]) -> list[int]:
    """Where an input goes by `first` and from there by `then`."""
    return [then[position] for position in first]


def nibbles_swapped(size: int) -> list[int]:
    """The two int4 values of each byte are exchanged."""
    return [position ^ 1 for position in range(size)]


def words_reversed(size: int) -> list[int]:
    """The eight int4 values of each 32-bit word are in the opposite order."""
    return [position ^ 7 for position in range(size)]


def describe(found: Sequence[int], expected: Sequence[int], left: int, right: int, steps: tuple[int, int]) -> str:
    """What is wrong with `found`, "" if it is as expected.

    Args:
        found, expected: position of each input in the output.
        left, right: sizes of the factors.
        steps: by how much the factors shift rows and columns.
    """
    if list(found) == list(expected):
        return ""
    size = left * right
    mistakes = {
        "the two int4 values of each byte are swapped": after(expected, nibbles_swapped(size)),
        "the int4 values of each 32-bit word are reversed": after(expected, words_reversed(size)),
        "left_trans acts as its transpose": cyclic(left, right, -steps[0], steps[1]),
        "right_trans acts as its transpose": cyclic(left, right, steps[0], -steps[1]),
        "both factors act as their transposes": cyclic(left, right, -steps[0], -steps[1]),
        "left_trans has no effect": cyclic(left, right, 0, steps[1]),
        "right_trans has no effect": cyclic(left, right, steps[0], 0),
    }
    moved = sum(a != b for a, b in zip(found, expected, strict=True))
    names = [name for name, positions in mistakes.items() if list(found) == positions]
    shown = " ".join("?" if position == LOST else str(position) for position in found[:SHOWN])
    wanted = " ".join(map(str, expected[:SHOWN]))
    return (
        f"{names[0] if names else 'unknown layout'}: {moved} of {len(found)} inputs come out elsewhere; "
        f"inputs 0, 1, 2, ... are at {shown} instead of {wanted}"
    )
