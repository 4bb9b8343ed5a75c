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
        "# Measured quality of the calibration\n\n"
        f"`python -m benchmarks.calibration` on {time.strftime('%Y-%m-%d', time.gmtime())}, model `{args.model.name}`, "
        f"{_processor()}, {os.cpu_count()} cores, torch {torch.__version__}. {args.note}\n\n"
        f"The figures are perplexities over {WINDOWS} windows of {WINDOW} tokens of `{args.text.name}`, through vLLM "
        f"with {args.dtype} activations; the calibration text is `{args.calib_file.name}`. Every figure is that of a "
        "saved checkpoint that `vllm-w4a4 verify` accepts. The text was not used to choose settings; see "
        "[how they were chosen](explanation/calibration.md#laboratory-notes).\n\n"
        + tables[0]
        + "\n\n"
        + (f"Cells that say {MISSING} ({missing}) were not measured.\n\n" if missing else "")
        + "- target: the mean perplexity must be below it.\n"
        f"- {SIMULATED}: perplexity of the same checkpoint in plain torch, without vLLM and this plugin's kernels, for "
        "each seed that was simulated, and its difference from vLLM's. It is the mean of "
        f"{len(DISTURBANCES)} runs with relative noise of up to {max(DISTURBANCES):g} on the embeddings; their "
        f"standard deviation is{spread}, because a value that is rounded the other way changes everything computed "
        "from it. vLLM's figure is that of a single run, with the same uncertainty.\n"
        "- seconds, CPU seconds, GB: elapsed time, CPU time (means over the seeds that were timed) and peak memory of "
        "`vllm-w4a4 quantize`.\n"
        "- own text: calibrated on text that the model generates.\n"
        '- `all-w4a4` and the cases with a number of steps continue the checkpoint of the case "not distilled" with '
        "`--start-from`, which is byte-identical to a single run; their times are sums of both runs.\n\n"
        "Options of `vllm-w4a4 quantize`, in addition to `--seed`:\n\n" + tables[1] + "\n"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
