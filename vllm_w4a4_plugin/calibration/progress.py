# SPDX-License-Identifier: Apache-2.0
"""How a run tells what it is doing."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Parts of a run, each of many equal units of work, so that time left can be estimated within each."""

    GRADIENTS_FORWARD = "Gradients, forward"
    GRADIENTS_BACKWARD = "Gradients, backward"
    QUANTIZING = "Quantizing"
    TEACHER = "Float predictions"
    DISTILLING = "Distilling"
    WRITING = "Writing"


@dataclass(frozen=True)
class Progress:
    """One piece of news.

    Attributes:
        phase: what is going on. done, total: units of it (blocks, or steps of distillation).
        detail: within the unit that is being worked on.
    """

    phase: Phase
    done: int
    total: int
    detail: str = ""


Listener = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """A listener that ignores everything."""
