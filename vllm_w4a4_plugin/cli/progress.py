# SPDX-License-Identifier: Apache-2.0
"""Progress on standard error: a bar in a terminal, and elsewhere a line at most every ten seconds."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_PER_LINE = 10.0


class ProgressDisplay:
    """Shows how far one task after another is; leave its context to remove the bar.

    Args:
        unit: of the work, shown in terminals: "B" for bytes, else with a space before it.
    """

    def __init__(self, unit: str = "B") -> None:
        self.unit = unit
        self._bar: tqdm | None = None
        self._shown = time.monotonic()

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, what: str, done: int, total: int) -> None:
        """What is being done, how much of it is done, and of how much."""
        if sys.stderr.isatty():
            self._show_bar(what, done, total)
        elif (now := time.monotonic()) - self._shown >= SECONDS_PER_LINE:
            self._shown = now
            print(f"{what}: {100 * done // max(1, total)} %", file=sys.stderr, flush=True)

    def _show_bar(self, what: str, done: int, total: int) -> None:
        if self._bar is None or self._bar.desc != f"{what}: ":
            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(total=total, initial=done, desc=what, unit=self.unit, unit_scale=True, leave=False)
        self._bar.update(done - self._bar.n)
