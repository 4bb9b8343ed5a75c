# SPDX-License-Identifier: Apache-2.0
"""One task after another on standard error, each with a bar."""

from types import TracebackType

from tqdm import tqdm

from .bars import bar


class ProgressDisplay:
    """Shows how far one task after another is; as text, where the last one stands. Leave its context to end the bar.

    Args:
        unit: of the work: "B" for bytes, else with a space before it.
        keeps: whether the bar of a task that has ended stays on the screen.
    """

    def __init__(self, unit: str = "B", keeps: bool = False) -> None:
        self.unit, self.keeps = unit, keeps
        self._bar: tqdm | None = None

    def __str__(self) -> str:
        return "at the start" if self._bar is None else f"{self._bar.desc}: {self._bar.n} of {self._bar.total}"

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, what: str, done: int, total: int, detail: str = "") -> None:
        """What is being done, how much of it is done and of how much, and what within it."""
        if self._bar is None or self._bar.desc != what:
            if self._bar is not None:
                self._bar.close()
            # What an earlier, interrupted run has done must not count towards the speed of this one.
            kind = {"unit": self.unit, "unit_scale": self.unit == "B", "leave": self.keeps}
            self._bar = bar(total=total, initial=done, desc=what, **kind)
        self._bar.set_postfix_str(detail, refresh=False)
        self._bar.update(done - self._bar.n)
        self._bar.refresh()
