# SPDX-License-Identifier: Apache-2.0
"""The experts of one layer at several numbers of tokens: ours, their peers and the machine's limits."""

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count, cycle
from typing import Any

import torch
from torch import Tensor

from vllm_w4a4_plugin.ops import arena

from . import limits
from .expert_peers import OURS, PEERS, PreparedExperts
from .kernels import import_vllm_kernels, machine
from .measure import interleaved, median_ratio
from .peers import Unavailable
from .publishing import believable
from .shapes import Experts

TOKENS = [1, 16, 256]
ROUTINGS = 16
"""Different choices of experts that take turns, so that one token's experts are not found in a cache."""


def run(
    layers: Iterable[Experts], tokens: Iterable[int], seconds: float, show: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure. Returns the contents of the JSON file (times in seconds, rates per second)."""
    result: dict[str, Any] = {"machine": machine()}  # first, while the load average is still that of other work
    import_vllm_kernels()
    limits.load()
    records: list[dict[str, Any]] = []
    unavailable: dict[str, str] = {}
    for experts in layers:
        prepared: dict[str, PreparedExperts] = {}
        for name, make in PEERS.items():
            try:
                prepared[name] = make(experts)
            except Unavailable as reason:
                unavailable[name] = str(reason)
        for number in tokens:
            record = believable(
                partial(measure, experts, number, prepared, seconds), lambda record: list(record["ours"].values())
            )
            records.append(record)
            times = ", ".join(f"{name} {time * 1e3:.3f} ms" for name, time in record["median"].items())
            show(f"{experts.name} {experts}, {number} tokens: {times}")
    return {**result, "unavailable": unavailable, "records": records}


def measure(experts: Experts, tokens: int, prepared: dict[str, PreparedExperts], seconds: float) -> dict[str, Any]:
    """One row: median times, our speedups, and our rates as fractions of the limits, which run in the same rounds."""
    generator = torch.Generator().manual_seed(tokens)
    routings = [experts.routing(tokens, generator) for _ in range(ROUTINGS)]
    x = torch.randn(tokens, experts.hidden, dtype=torch.bfloat16)
    contestants: dict[str, Callable[[], object]] = {
        name: _in_turn(peer, x.to(peer.dtype), routings) for name, peer in prepared.items()
    }
    # As many bytes as those of the experts used, in one piece, which is the fastest way to read them.
    used = [len(ids.unique()) for _, ids in routings]
    expert_bytes = prepared[OURS[0]].weight_bytes // experts.count
    # In pages like those of packed weights; untouched zeros would share one page.
    memory = arena.empty((experts.count * expert_bytes,), torch.uint8).fill_(1)
    turn = count()

    def read() -> None:
        number = next(turn)
        size = used[number % ROUTINGS] * expert_bytes
        # Another part of the memory each time, as the experts are.
        begin = number * size % (len(memory) - size + 1) // 8 * 8
        limits.read(memory[begin : begin + size])

    contestants["read"] = read
    dot = limits.dot_products()
    if dot:
        contestants["dot"] = limits.dot_products
    times = interleaved(contestants, seconds, most=ROUTINGS * 20)
    median = {name: statistics.median(values) for name, values in times.items()}
    operations = 2 * tokens * experts.top_k * experts.values
    ours = {
        name: {
            "speedup": {
                peer: median_ratio(times[peer], times[name]) for peer in prepared if peer not in OURS
            },
            "of_read_bandwidth": median_ratio(times["read"], times[name]),
            "of_dot_peak": operations / dot * median_ratio(times["dot"], times[name]) if dot else None,
        }
        for name in OURS
    }  # fmt: skip
    return {
        "experts": str(experts),
        "model": experts.name,
        "tokens": tokens,
        "used": statistics.mean(used),
        "rounds": len(times[OURS[0]]),
        "kernels": {name: peer.kernel for name, peer in prepared.items()},
        "median": median,
        "read_bandwidth": statistics.mean(used) * expert_bytes / statistics.mean(times["read"]),
        "dot_peak": dot / median["dot"] if dot else None,
        "ours": ours,
    }


def _in_turn(peer: PreparedExperts, x: Tensor, routings: list[tuple[Tensor, Tensor]]) -> Callable[[], object]:
    turn = cycle(routings)
    return lambda: peer.run(x, *next(turn))
