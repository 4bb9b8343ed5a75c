# SPDX-License-Identifier: Apache-2.0
"""Every linear layer of every model at every number of tokens: our kernel, its peers and the machine's limits."""

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch

from vllm_w4a4_plugin import ops
from vllm_w4a4_plugin.checkpoint.spec import kronecker_sizes
from vllm_w4a4_plugin.ops import arena

from . import limits
from .measure import interleaved, median_ratio
from .peers import PEERS, Prepared, Unavailable, w4a4_flatquant
from .publishing import believable
from .shapes import Linear, Model

OURS = "w4a4_flatquant"
TOKENS = [1, 4, 16, 64, 256, 1024]


def run(
    models: Iterable[Model], tokens: Iterable[int], seconds: float, show: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure. Returns the contents of the JSON file (times in seconds, rates per second)."""
    result: dict[str, Any] = {"machine": machine()}  # first, while the load average is still that of other work
    import_vllm_kernels()
    limits.load()
    records, notes = [], {}
    for model in models:
        for linear in model.linears:
            prepared = prepare(linear, notes)
            for count in tokens:
                row = believable(partial(measure_linear, linear, count, prepared, seconds), lambda row: [row])
                record = {"model": model.name, **row}
                records.append(record)
                show(f"{model.name} {linear}, {count} tokens: {record['median'][OURS] * 1e3:.3f} ms")
            del prepared
    return {**result, "unavailable": notes, "records": records}


def import_vllm_kernels() -> None:
    from vllm.platforms import current_platform

    current_platform.import_kernels()


def prepare(linear: Linear, notes: dict[str, str]) -> dict[str, Prepared]:
    prepared = {}
    for name, make in PEERS.items():
        try:
            prepared[name] = make(linear)
        except Unavailable as reason:
            notes[name] = str(reason)
    return prepared


def measure_linear(linear: Linear, tokens: int, prepared: dict[str, Prepared], seconds: float) -> dict[str, Any]:
    """One row: median times, our speedups, and our rates as fractions of the limits, which run in the same rounds."""
    x = torch.randn(tokens, linear.input_size, dtype=torch.bfloat16)
    weight = prepared[OURS].weight
    assert weight is not None
    left, right = (torch.randn(n, n) / n**0.5 for n in kronecker_sizes(linear.input_size))
    clip = torch.tensor([0.95])
    inputs = {dtype: x.to(dtype) for dtype in {peer.dtype for peer in prepared.values()}}
    contestants: dict[str, Callable[[], object]] = {
        name: (lambda run=peer.run, x=inputs[peer.dtype]: run(x)) for name, peer in prepared.items()
    }
    # A copy, because reading the operator's own weights would bring them into the cache for it, in pages like theirs.
    copy = arena.empty(weight.shape, weight.dtype).copy_(weight)
    contestants["read"] = lambda: limits.read(copy)
    contestants["quantize"] = lambda: torch.ops.vllm_w4a4.kronecker_quant(x, left, right, clip)
    dot, fma = limits.dot_products(), limits.fma()
    if dot:
        contestants["dot"] = limits.dot_products
    if fma:
        contestants["fma"] = limits.fma
    times = interleaved(contestants, seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    operations = 2 * tokens * linear.input_size * linear.output_size
    transform_operations = 2 * tokens * linear.input_size * sum(kronecker_sizes(linear.input_size))
    return {
        "linear": linear.name,
        "in": linear.input_size,
        "out": linear.output_size,
        "tokens": tokens,
        "rounds": len(times[OURS]),
        "kernels": {name: peer.kernel for name, peer in prepared.items()},
        "median": median,
        "speedup": {name: median_ratio(times[name], times[OURS]) for name in prepared if name != OURS},
        "read_bandwidth": weight.numel() / median["read"],
        "of_read_bandwidth": median_ratio(times["read"], times[OURS]),
        "dot_peak": dot / median["dot"] if dot else None,
        "of_dot_peak": operations / dot * median_ratio(times["dot"], times[OURS]) if dot else None,
        "quantize_share": median_ratio(times["quantize"], times[OURS]),
        "of_fma_peak": transform_operations / fma * median_ratio(times["fma"], times["quantize"]) if fma else None,
    }


def scaling(linear: Linear, tokens: int, seconds: float) -> float:
    """The speedup of two threads over one."""
    prepared = w4a4_flatquant(linear)
    x = torch.randn(tokens, linear.input_size, dtype=torch.bfloat16)

    def on(threads: int) -> Callable[[], object]:
        def run() -> None:
            torch.set_num_threads(threads)
            prepared.run(x)

        return run

    before = torch.get_num_threads()
    try:
        times = interleaved({"one": on(1), "two": on(2)}, seconds)
    finally:
        torch.set_num_threads(before)
    return median_ratio(times["one"], times["two"])


def machine() -> dict[str, Any]:
    import vllm

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=limits.ROOT)
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": model,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "instruction_set": ops.cpu_instruction_set(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "commit": commit.stdout.strip(),
    }


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.readlines()
    except OSError:
        return []
