# SPDX-License-Identifier: Apache-2.0
"""Self times from a trace made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trace import self_times


def event(name: str, start: float, duration: float, thread: int = 1, category: str = "cpu_op") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread}


def test_time_counts_once(tmp_path: Path) -> None:
    events = [
        event("graph", 0, 60),
        event("linear", 10, 20),
        event("attention", 40, 10),
        event("copy", 42, 4),
        event("linear", 80, 20),
        event("other thread", 0, 50, thread=2),
        event("no operator", 0, 100, category="user_annotation"),
    ]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    shares = self_times(trace)
    expected = {"graph": 0.30, "linear": 0.40, "attention": 0.06, "copy": 0.04, "Python and vLLM": 0.20}
    assert shares == pytest.approx(expected)
    assert list(shares)[:2] == ["linear", "graph"]
