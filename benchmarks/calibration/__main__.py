# SPDX-License-Identifier: Apache-2.0
"""Quality of `vllm-w4a4 quantize` over several seeds.

Results are kept in WORK/results.json after every run; a run found there is not repeated. Cases that differ only in
distillation continue one checkpoint with `--start-from`, whose result is byte-identical to that of a whole run.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from vllm_w4a4_plugin.text import format_table

from .cases import CASES, SEEDS
from .measure import measured, served
from .page import page
from .results import FLOAT, HEADER, Result, read_results, rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="float model")
    parser.add_argument("--text", type=Path, required=True, help="text to measure perplexity on")
    parser.add_argument("--calib-file", type=Path, required=True, help="calibration text")
    parser.add_argument("--case", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--simulate", type=int, nargs="*", default=[0], help="seeds to simulate as well (default: 0)")
    parser.add_argument("--dtype", default="float32", help="dtype of activations in vLLM (default: float32)")
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints and results.json")
    parser.add_argument("--docs", type=Path, help="Markdown file to write the tables to")
    parser.add_argument("--note", default="", help="a sentence for that page, e.g. about what else ran on the machine")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "results.json"
    results = read_results(file) if file.exists() else []
    wanted = [(None, 0), *((case, seed) for case in CASES if case.name in args.case for seed in args.seeds)]
    for case, seed in wanted:
        name = case.name if case else FLOAT
        if not any(r.case == name and r.seed == seed for r in results):
            results.append(measured(args, case, seed) if case else Result(name, 0, served(args, args.model)))
            print(json.dumps(asdict(results[-1])), flush=True)
            file.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
            if args.docs:
                args.docs.write_text(page(results, args))
    print(format_table(HEADER, rows(results)))
    if args.docs:
        args.docs.write_text(page(results, args))


if __name__ == "__main__":
    main()
