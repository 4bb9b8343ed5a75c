# SPDX-License-Identifier: Apache-2.0
"""The documentation page of the results."""

import argparse
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from .cases import CASES, SEEDS
from .measure import DISTURBANCES, WINDOW, WINDOWS
from .results import HEADER, MISSING, SIMULATED, Result, rows


def page(results: Sequence[Result], args: argparse.Namespace) -> str:
    """The Markdown page."""
    import torch

    tables = ["\n".join(f"| {' | '.join(line)} |" for line in [HEADER, ["---"] * len(HEADER), *rows(results)])]
    options = [
        [case.name, f"`{' '.join(case.options)}`" + ("" if case.own_text else ", `--calib-file`")] for case in CASES
    ]
    tables.append("\n".join(f"| {' | '.join(line)} |" for line in [["case", "options"], ["---", "---"], *options]))
    several = [r.simulated for r in results if len(r.simulated) > 1]
    spread = f" {100 * mean(stdev(found) / mean(found) for found in several):.1f} %" if several else ""
    missing = sum(line.count(MISSING) for line in (row[3 : 3 + len(SEEDS)] for row in rows(results)))
    return (
        "# Quality of the calibration, measured\n\n"
        f"`python -m benchmarks.calibration` on {time.strftime('%Y-%m-%d', time.gmtime())}, model `{args.model.name}`, "
        f"{_processor()}, {os.cpu_count()} cores, torch {torch.__version__}. {args.note}\n\n"
        f"Perplexity over {WINDOWS} windows of {WINDOW} tokens of `{args.text.name}` through vLLM with {args.dtype} "
        f"activations; calibration text `{args.calib_file.name}`. Every figure comes from a saved checkpoint that "
        "`vllm-w4a4 verify` accepts. The text was not used to choose settings (`quantize.md` says what was).\n\n"
        + tables[0]
        + "\n\n"
        + (f"{missing} cells are {MISSING}: they were not measured. " if missing else "")
        + f'"{SIMULATED}" is the same checkpoint in plain torch, without vLLM and this plugin\'s kernels, by seed: '
        f"means of {len(DISTURBANCES)} runs with embeddings disturbed by up to {max(DISTURBANCES):g}, which have a "
        f"standard deviation of{spread}, because roundings flip. A served figure is one run, with the same "
        "uncertainty. `all-w4a4` and the cases that name their steps continue the checkpoint of the case called not "
        "distilled with `--start-from`; the result is byte-identical to that of a whole run. Their times, means over "
        "the seeds that were timed, are sums of both runs.\n\n"
        "Options of `vllm-w4a4 quantize`, in addition to `--seed`:\n\n" + tables[1] + "\n"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
