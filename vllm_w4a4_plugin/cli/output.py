# SPDX-License-Identifier: Apache-2.0
"""Standard output whose reader goes away early, or whose disk is full."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class GuardedOutput:
    """A stream that drops everything after the first write that fails.

    The command goes on, so that its exit code still says what it found, and nothing is half done.

    Args:
        stream: the stream, which must have a file descriptor by the time a write fails.

    Attributes:
        error: why a write failed; empty if none did. A reader that has seen enough, such as `head -1`, is no failure.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error = ""

    def write(self, text: str) -> int:
        """Write, or drop, a text; returns its length."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def failed(self) -> bool:
        """Whether a write failed, those included that were buffered so far."""
        self.flush()
        return bool(self.error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            self.error = error.strerror or str(error)
        # What is still buffered, and is written when the interpreter exits, must find a file that takes it.
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, self._stream.fileno())
        os.close(sink)


@contextmanager
def guarded_stdout() -> Iterator[GuardedOutput]:
    """Inside, `sys.stdout` is a `GuardedOutput`."""
    original = sys.stdout
    guarded = GuardedOutput(original or io.StringIO())  # there is none if the shell closed it
    sys.stdout = guarded
    try:
        yield guarded
    finally:
        sys.stdout = original
