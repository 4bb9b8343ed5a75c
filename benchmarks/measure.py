# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: other work on the machine slows all contestants alike, so ratios are more reliable than times."""

import random
import statistics
import time
from collections.abc import Callable

Contestants = dict[str, Callable[[], object]]


def interleaved(
    contestants: Contestants, seconds: float = 2.0, least: int = 3, most: int = 200
) -> dict[str, list[float]]:
    """Run all contestants once a round until `seconds` have passed, between `least` and `most` rounds.

    Each round has an order of its own, the same in every run: what a contestant leaves in the caches, and whether it
    leaves the threads awake, must not always fall to the same neighbour.

    Returns:
        Seconds of each run by name, in the order of the rounds. A first round warms the caches and is not counted.
    """
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() < end):
        shuffle(order)
        for name in order:
            run = contestants[name]
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
        rounds += 1
    return times


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
