# SPDX-License-Identifier: Apache-2.0
"""One task after another on standard error, each with a bar."""

from types import TracebackType

from tqdm import tqdm

from .bars import bar


class ProgressDisplay:
    """Shows how far one task after another is; leave its context to remove the bar.

    Args:
        unit: of the work: "B" for bytes, else with a space before it.
    """

    def __init__(self, unit: str = "B") -> None:
        self.unit = unit
        self._bar: tqdm | None = None

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, what: str, done: int, total: int) -> None:
        """What is being done, how much of it is done, and of how much."""
        if self._bar is None or self._bar.desc != what:
            if self._bar is not None:
                self._bar.close()
            self._bar = bar(total=total, initial=done, desc=what, unit=self.unit, unit_scale=True, leave=False)
        self._bar.update(done - self._bar.n)
