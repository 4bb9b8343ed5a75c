# SPDX-License-Identifier: Apache-2.0
"""Self times from a trace made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import trace
from benchmarks.trace import BETWEEN, LINEARS, OTHER, PYTHON, self_times


def event(name: str, start: float, duration: float, thread: int = 1, category: str = "cpu_op") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread}


def test_time_counts_once(tmp_path: Path) -> None:
    events = [
        event("aten::copy_", 0, 2),
        event(LINEARS[0], 5, 35),
        event("aten::empty", 10, 5),
        event("_C::cpu_attention_with_kv_cache", 50, 10),
        event(LINEARS[1], 60, 10),
        event("aten::argmax", 75, 5),
        event("aten::copy_", 85, 6),
        event("aten::empty", 86, 1),
        event(LINEARS[0], 95, 5),
        event("other thread", 0, 50, thread=2),
        event("no operator", 0, 200, category="user_annotation"),
    ]
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": events}))
    shares = self_times(file)
    # Between steps: 0 to 5 and 80 to 95, whatever runs there. In the model without an operator: 40 to 50, 70 to 75.
    expected = {
        LINEARS[0]: 0.35, LINEARS[1]: 0.10, "aten::empty": 0.05, "_C::cpu_attention_with_kv_cache": 0.10,
        "aten::argmax": 0.05, PYTHON: 0.15, BETWEEN: 0.20,
    }  # fmt: skip
    assert shares == pytest.approx(expected)
    assert next(iter(shares)) == LINEARS[0]
    parts = trace.parts(shares)
    assert list(parts) == list(trace.PARTS)
    assert {part: share for part, share in parts.items() if share} == pytest.approx(
        {"linear layers": 0.45, "attention": 0.10, OTHER: 0.10, PYTHON: 0.15, BETWEEN: 0.20}
    )
