# SPDX-License-Identifier: Apache-2.0
"""Progress bars: drawn in a terminal, and a line every ten seconds at most in a log."""

import sys
import time
from typing import Any

from tqdm import tqdm

from .log_files import LOG_INTERVAL_S


class LogBar(tqdm):
    """A bar for files: whole lines, none in the first ten seconds and then one every ten seconds at most."""

    def __init__(self, **kwargs: Any) -> None:
        self._last_line = time.monotonic()
        super().__init__(**kwargs | {"leave": False, "mininterval": 0, "miniters": 1})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print the state as a line if the last one is old enough. An empty `msg`, which erases a bar, does nothing."""
        now = time.monotonic()
        if msg != "" and now - self._last_line >= LOG_INTERVAL_S:
            self._last_line = now
            print(str(self).strip(), file=self.fp, flush=True)
        return False


def bar(**kwargs: Any) -> tqdm:
    """A bar on standard error, with tqdm's arguments."""
    return (tqdm if sys.stderr.isatty() else LogBar)(**kwargs)
