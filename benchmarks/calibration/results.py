# SPDX-License-Identifier: Apache-2.0
"""Results of the measurements, and their table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from .cases import CASES, SEEDS

FLOAT, MISSING = "float", "missing"
SIMULATED = "simulated"
HEADER = [
    "case", "target", "mean", *(f"seed {seed}" for seed in SEEDS), SIMULATED, "seconds", "CPU seconds", "GB"
]  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Cost of `vllm-w4a4 quantize`, including the start of Python and the run whose checkpoint it continued.

    Attributes:
        seconds, cpu_seconds: elapsed time and CPU time.
        peak_bytes: peak resident memory.
    """

    seconds: float = 0
    cpu_seconds: float = 0
    peak_bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        peak = max(self.peak_bytes, other.peak_bytes)
        return Cost(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds, peak)


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        case, seed: of the run; "float" is the model before quantization.
        served: perplexity through vLLM.
        simulated: perplexity in plain torch from the stored integers, once per disturbance; empty if not requested.
        cost: None where it was not measured.
    """

    case: str
    seed: int
    served: float
    simulated: Sequence[float] = ()
    cost: Cost | None = None


def read_results(file: Path) -> list[Result]:
    """The contents of `results.json`."""
    return [
        Result(**{**entry, "cost": Cost(**entry["cost"]) if entry["cost"] else None})
        for entry in json.loads(file.read_text())
    ]


def rows(results: Sequence[Result]) -> list[list[str]]:
    """Cells under `HEADER` for the float model and every case; `MISSING` where nothing was measured."""
    found = []
    for name, target in [(FLOAT, None), *((case.name, case.target) for case in CASES)]:
        runs = {r.seed: r for r in results if r.case == name}
        served = [r.served for r in runs.values()]
        average = f"{mean(served):.2f}" if served else MISSING
        if served and name != FLOAT and len(served) < len(SEEDS):
            average += f" ({len(served)} of {len(SEEDS)} seeds)"
        by_seed = [f"{runs[seed].served:.2f}" if seed in runs else MISSING for seed in SEEDS]
        simulated = ", ".join(_compared_with_served(r) for _, r in sorted(runs.items()) if r.simulated)
        costs = [r.cost for r in runs.values() if r.cost]
        cost = ["", "", ""]
        if costs:
            seconds, cpu = mean(c.seconds for c in costs), mean(c.cpu_seconds for c in costs)
            cost = [f"{seconds:.0f}", f"{cpu:.0f}", f"{max(c.peak_bytes for c in costs) / 1e9:.2f}"]
        if name == FLOAT:
            by_seed = [""] * len(SEEDS)
        found.append([name, f"{target:.1f}" if target else "", average, *by_seed, simulated, *cost])
    return found


def _compared_with_served(result: Result) -> str:
    found = mean(result.simulated)
    return f"{found:.2f} ({100 * (found / result.served - 1):+.1f} %)"
