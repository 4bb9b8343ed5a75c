# SPDX-License-Identifier: Apache-2.0
"""What came of a step."""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a step ended; the first word of its line."""

    OK = "ok"
    NOTE = "note"
    SKIPPED = "skipped"
    FAILED = "FAILED"


@dataclass(frozen=True)
class Outcome:
    """Attributes: `message` continues the step's line; `data` are figures for the JSON file."""

    status: Status
    message: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values, the argument of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Outcome":
        """The outcome that `as_json` described."""
        return cls(Status(values["status"]), values["message"], values["data"])


def passed(message: str = "", /, **data: Any) -> Outcome:
    """A step that found what was expected."""
    return Outcome(Status.OK, message, data)


def failed(message: str, /, **data: Any) -> Outcome:
    """A step that found something else."""
    return Outcome(Status.FAILED, message, data)
