# SPDX-License-Identifier: Apache-2.0
"""What every contestant of the end-to-end benchmark does, and how its process reports."""

from pathlib import Path

PREFILL, PROMPT, STEPS = 1024, 2, 16
"""Tokens of the long and of the short prompt, and decode steps that are averaged."""

MOST_REQUESTS = 16

RESULT = "RESULT "
"""Begins the line in which a contestant prints its result as JSON."""


def tokens_of(request: int, count: int, vocabulary: int = 40000) -> list[int]:
    """The prompt of a request: `count` token numbers below `vocabulary`."""
    return [(7 * i + 13 * request) % vocabulary for i in range(count)]


def peak_memory() -> int:
    """Peak resident memory of the largest of this process and its children, in bytes."""
    import psutil

    this = psutil.Process()
    peaks = []
    for process in (this, *this.children(recursive=True)):
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peaks += [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")]
    return max(peaks)
