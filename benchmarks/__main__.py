# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks: measure, print the tables, write JSON and, with --docs, the page and its plots."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from . import report
from .kernels import TOKENS, run, scaling
from .shapes import MODELS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--models", nargs="+", default=[model.name for model in MODELS], metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time to spend on each linear layer and token count (default: 2)"
    )
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks/kernels.json"))
    parser.add_argument(
        "--docs", type=Path, help="directory for performance.md and the pages and plots in performance/"
    )
    parser.add_argument(
        "--from-json", action="store_true", help="do not measure; make the page from the file given by --json"
    )
    options = parser.parse_args()
    models = [model for model in MODELS if model.name in options.models]
    if unknown := set(options.models) - {model.name for model in MODELS}:
        parser.error(f"unknown models {sorted(unknown)}; choose from {[model.name for model in MODELS]}")

    if not options.from_json and os.getloadavg()[0] > 0.5:
        print(
            f"warning: the load average is {os.getloadavg()[0]:.1f}: other work will distort the times", file=sys.stderr
        )
    torch.manual_seed(0)
    if options.from_json:
        result = json.loads(options.json.read_text())
    else:
        result = run(models, options.tokens, options.seconds, lambda line: print(line, flush=True))
        linear = models[-1].linears[0]
        result["scaling"] = {"case": f"{models[-1].name} {linear}, 256 tokens", "factor": scaling(linear, 256, 5.0)}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    plots = []
    if options.docs:
        report.refuse_if(report.faults(result))
        pages = options.docs / "performance"
        pages.mkdir(parents=True, exist_ok=True)
        plots = report.plot(result, pages)
        page = report.markdown(result, plots)
        (pages / f"{result['machine']['instruction_set']}.md").write_text(page)
        (options.docs / "performance.md").write_text(report.index(pages))
    print(report.markdown(result, plots))


if __name__ == "__main__":
    main()
