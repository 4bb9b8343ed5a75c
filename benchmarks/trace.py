# SPDX-License-Identifier: Apache-2.0
"""Where a profiled run spent its time: self time by operator and by part of a step, from a torch profiler trace."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

LINEARS = tuple(f"vllm_w4a4::{name}" for name in ("flatquant_linear", "norm_flatquant_linear", "silu_flatquant_linear"))
END_OF_STEP = "aten::argmax"
"""Greedy sampling: what follows until the next linear layer does not belong to the model."""

PYTHON, BETWEEN = "Python in the model", "vLLM between steps"
OTHER = "other operators"

PARTS = {
    "linear layers": LINEARS,
    "output head": ("vllm_w4a4::w8a8_linear",),
    "attention": ("_C::cpu_attention_with_kv_cache", "_C::cpu_attn_reshape_and_cache"),
    "norms": ("_C::rms_norm", "_C::fused_add_rms_norm", "vllm_w4a4::rms_norm"),
    "rotary embedding": ("_C::rotary_embedding",),
    "SiLU": ("vllm_w4a4::silu_and_mul",),
    OTHER: (),
    PYTHON: (PYTHON,),
    BETWEEN: (BETWEEN,),
}
"""Parts of a step and their operators; OTHER has those that are in no list."""


def self_times(trace: Path) -> dict[str, float]:
    """Share of the busiest thread's wall time spent in each operator itself, without what it calls.

    Args:
        trace: a Chrome trace (`*.json` or `*.json.gz`). Time outside all operators is PYTHON from a step's first linear
            layer to its sampling, and BETWEEN elsewhere, with the operators that run there.
    """
    with gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open() as stream:
        events = [e for e in json.load(stream)["traceEvents"] if e.get("ph") == "X" and e.get("cat") == "cpu_op"]
    by_thread: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        by_thread.setdefault(event["tid"], []).append(event)
    thread = max(by_thread.values(), key=lambda events: sum(event["dur"] for event in events))
    return _shares(sorted(thread, key=lambda event: (event["ts"], -event["dur"])))


def parts(self_times: dict[str, float]) -> dict[str, float]:
    """The shares of `self_times` summed up for each of PARTS."""
    part_of = {operator: part for part, operators in PARTS.items() for operator in operators}
    sums: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    for operator, share in self_times.items():
        sums[part_of.get(operator, OTHER)] += share
    return dict(sums)


def _shares(events: list[dict[str, Any]]) -> dict[str, float]:
    times: Counter[str] = Counter()
    begin = end = events[0]["ts"]
    stack: list[tuple[str, float]] = []
    in_step = False
    for event in events:
        name, duration = event["name"], event["dur"]
        while stack and stack[-1][1] <= event["ts"]:
            stack.pop()
        if stack:
            times[stack[-1][0]] -= duration
        else:
            times[PYTHON if in_step else BETWEEN] += event["ts"] - end
            end = event["ts"] + duration
        in_step = in_step or name in LINEARS
        own = name if in_step else BETWEEN
        times[own] += duration
        stack.append((own, event["ts"] + duration))
        in_step = in_step and name != END_OF_STEP
    return {name: time / (end - begin) for name, time in times.most_common()}
