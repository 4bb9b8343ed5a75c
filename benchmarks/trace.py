# SPDX-License-Identifier: Apache-2.0
"""Where a profiled run spent its time: self time by operator, from a torch profiler trace."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any


def self_times(trace: Path) -> dict[str, float]:
    """Share of the busiest thread's wall time spent in each operator itself, without what it calls.

    Args:
        trace: a Chrome trace (`*.json` or `*.json.gz`). Time outside all operators is named "Python and vLLM".
    """
    with gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open() as stream:
        events = [e for e in json.load(stream)["traceEvents"] if e.get("ph") == "X" and e.get("cat") == "cpu_op"]
    by_thread: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        by_thread.setdefault(event["tid"], []).append(event)
    thread = max(by_thread.values(), key=lambda events: sum(event["dur"] for event in events))
    return _shares(sorted(thread, key=lambda event: (event["ts"], -event["dur"])))


def _shares(events: list[dict[str, Any]]) -> dict[str, float]:
    times: Counter[str] = Counter()
    begin, end, covered = events[0]["ts"], events[0]["ts"], 0.0
    stack: list[tuple[str, float]] = []
    for event in events:
        stop = event["ts"] + event["dur"]
        while stack and stack[-1][1] <= event["ts"]:
            stack.pop()
        if stack:
            times[stack[-1][0]] -= event["dur"]
        else:
            covered += event["dur"]
        times[event["name"]] += event["dur"]
        stack.append((event["name"], stop))
        end = max(end, stop)
    times["Python and vLLM"] = end - begin - covered
    return {name: time / (end - begin) for name, time in times.most_common()}
