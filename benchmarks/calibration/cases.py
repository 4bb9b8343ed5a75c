# SPDX-License-Identifier: Apache-2.0
"""The cases to compare: recipes, lengths of distillation, and calibration text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: as shown in the table.
        options: for `vllm-w4a4 quantize`, including those of `start`.
        own_text: calibrate on text that the model generates.
        start: the case without distillation whose checkpoint is distilled.
        target: the mean perplexity must be below this.
    """

    name: str
    options: Sequence[str]
    own_text: bool = False
    start: str | None = None
    target: float | None = None

    def output(self, work: Path, seed: int) -> Path:
        """The checkpoint's directory."""
        return work / f"{self.name.replace(', ', '-').replace(' ', '-')}-{seed}"


LONGER, LONGEST = ["--distill", "64"], ["--distill", "256"]
PLAIN, PLAIN_ALL = "tutorial, not distilled", "all-w4a4, not distilled"
CASES = (
    Case(PLAIN, ["--recipe", "tutorial", "--distill", "0"]),
    Case("tutorial", ["--recipe", "tutorial"], target=39.5),  # as users run it, to show the time
    Case("tutorial, 64 steps", ["--recipe", "tutorial", *LONGER], start=PLAIN),
    Case("tutorial, 256 steps", ["--recipe", "tutorial", *LONGEST], start=PLAIN, target=38.0),
    Case("tutorial, own text", ["--recipe", "tutorial"], own_text=True, target=41.0),
    Case("w4a4-w8a8", ["--recipe", "w4a4-w8a8"]),
    Case("w4a4-dynamic", ["--recipe", "w4a4-dynamic"]),
    Case(PLAIN_ALL, ["--recipe", "all-w4a4", "--distill", "0"]),
    Case("all-w4a4", ["--recipe", "all-w4a4"], start=PLAIN_ALL, target=44.0),
    Case("all-w4a4, 64 steps", ["--recipe", "all-w4a4", *LONGER], start=PLAIN_ALL, target=42.0),
)
