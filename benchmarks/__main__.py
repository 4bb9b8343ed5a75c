# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks: measure, print the tables, write JSON and, with --docs, the pages and their plots.

Linear layers and experts are measured one after the other, and have a JSON file and a page each.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import experts, publishing, report, report_experts
from .kernels import TOKENS, run, scaling
from .shapes import EXPERTS, MODELS, Experts, Model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [shape.name for shape in (*MODELS, *EXPERTS)]
    parser.add_argument("--models", nargs="+", default=names, metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, help=f"default: {TOKENS}, of experts {experts.TOKENS}")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time to spend on each linear layer and token count (default: 2)"
    )
    parser.add_argument(
        "--experts-seconds", type=float, default=20.0, help="time to spend on the experts of a model and each token "
        "count (default: 20)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, default=Path("build/benchmarks"), help="directory for kernels.json and experts.json"
    )
    parser.add_argument(
        "--docs", type=Path, help="directory for performance.md and the pages and plots in performance/"
    )
    parser.add_argument(
        "--from-json", action="store_true", help="do not measure; make the pages from the files in --json"
    )
    options = parser.parse_args()
    if unknown := set(options.models) - set(names):
        parser.error(f"unknown models {sorted(unknown)}; choose from {names}")
    torch.manual_seed(0)
    if not options.from_json and os.getloadavg()[0] > 0.5:
        print(
            f"warning: the load average is {os.getloadavg()[0]:.1f}: other work will distort the times", file=sys.stderr
        )
    if models := [model for model in MODELS if model.name in options.models]:
        linears(models, options)
    if layers := [layer for layer in EXPERTS if layer.name in options.models]:
        mixtures(layers, options)


def linears(models: list[Model], options: argparse.Namespace) -> None:
    """The benchmark of linear layers."""

    def measure() -> dict[str, Any]:
        result = run(models, options.tokens or TOKENS, options.seconds, show)
        linear = models[-1].linears[0]
        return result | {
            "scaling": {"case": f"{models[-1].name} {linear}, 256 tokens", "factor": scaling(linear, 256, 5.0)}
        }

    result = measured(options, "kernels.json", measure)
    plots = []
    if options.docs:
        pages = publishable(options, report.faults(result))
        plots = report.plot(result, pages)
        write_page(options, result, "", report.markdown(result, plots))
    print(report.markdown(result, plots))


def mixtures(layers: list[Experts], options: argparse.Namespace) -> None:
    """The benchmark of experts."""
    tokens = options.tokens or experts.TOKENS
    result = measured(options, "experts.json", lambda: experts.run(layers, tokens, options.experts_seconds, show))
    page = report_experts.markdown(result)
    if options.docs:
        publishable(options, report_experts.faults(result))
        write_page(options, result, report.EXPERTS_SUFFIX, page)
    print(page)


def show(line: str) -> None:
    """Progress, also where standard output is a file."""
    print(line, flush=True)


def measured(options: argparse.Namespace, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result from its JSON file, or measured and written there."""
    file = options.json / name
    if options.from_json:
        return json.loads(file.read_text())
    result = measure()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def publishable(options: argparse.Namespace, faults: list[str]) -> Path:
    """The directory of the pages; ends the process if a result has faults."""
    publishing.refuse_if(faults)
    pages = options.docs / "performance"
    pages.mkdir(parents=True, exist_ok=True)
    return pages


def write_page(options: argparse.Namespace, result: dict[str, Any], suffix: str, text: str) -> None:
    """Write the page of the result's instruction set, and the index of all."""
    pages = options.docs / "performance"
    (pages / f"{result['machine']['instruction_set']}{suffix}.md").write_text(text)
    (options.docs / "performance.md").write_text(report.index(pages))


if __name__ == "__main__":
    main()
