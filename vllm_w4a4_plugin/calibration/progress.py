# SPDX-License-Identifier: Apache-2.0
"""How a run reports its progress."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Phases of a run, in order. Each has many equal units of work, so that its remaining time can be estimated."""

    CHECKING_WEIGHTS = "Checking weights"
    GENERATING_TEXT = "Generating text"
    GRADIENTS_FORWARD = "Gradients, forward"
    GRADIENTS_BACKWARD = "Gradients, backward"
    QUANTIZING = "Quantizing"
    TEACHER = "Float predictions"
    DISTILLING = "Distilling"
    WRITING = "Writing"


@dataclass(frozen=True)
class Progress:
    """A step forward.

    Attributes:
        phase: the current phase.
        done, total: units of it: tensors that are checked, tokens of generated text, blocks, or distillation steps.
        detail: what is being done within the current unit.
    """

    phase: Phase
    done: int
    total: int
    detail: str = ""


Listener = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """A listener that ignores everything."""
