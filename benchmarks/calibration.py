# SPDX-License-Identifier: Apache-2.0
"""Quality of `vllm-w4a4 quantize` over several seeds: every figure is that of a saved checkpoint, verified and served.

python -m benchmarks.calibration MODEL --text FILE --calib-file FILE --work DIR [--docs docs/calibration.md]

Results are stored in WORK/results.json after every run; a run found there is not repeated. Cases that differ only in
distillation continue the same checkpoint with `--start-from`, which is byte-identical to a single run.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from vllm_w4a4_plugin.text import format_table

WINDOW, WINDOWS = 512, 24
FLOAT, MISSING = "float", "missing"
SIMULATED = "simulated"
# A simulation is repeated with this much relative noise on the embeddings: single roundings to 4 bits depend on the
# last bit of the arithmetic and change everything after them, so one run says little about a difference of 1 %.
DISTURBANCES = (0, 1e-6, 2e-6, 3e-6)
SEEDS = (0, 1, 2)
HEADER = [
    "case", "target", "mean", *(f"seed {seed}" for seed in SEEDS), SIMULATED, "seconds", "CPU seconds", "GB"
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: as shown in the table.
        options: for `vllm-w4a4 quantize`, including those of `start`.
        own_text: calibrate on text that the model generates.
        start: the case without distillation whose checkpoint is distilled.
        target: the mean perplexity must be below it.
    """

    name: str
    options: Sequence[str]
    own_text: bool = False
    start: str | None = None
    target: float | None = None

    def output(self, work: Path, seed: int) -> Path:
        """The checkpoint's directory."""
        return work / f"{self.name.replace(', ', '-').replace(' ', '-')}-{seed}"


LONGER, LONGEST = ["--distill", "64"], ["--distill", "256"]
PLAIN, PLAIN_ALL = "tutorial, not distilled", "all-w4a4, not distilled"
CASES = (
    Case(PLAIN, ["--recipe", "tutorial", "--distill", "0"]),
    Case("tutorial", ["--recipe", "tutorial"], target=39.5),  # in one run, as users do, for the time
    Case("tutorial, 64 steps", ["--recipe", "tutorial", *LONGER], start=PLAIN),
    Case("tutorial, 256 steps", ["--recipe", "tutorial", *LONGEST], start=PLAIN, target=38.0),
    Case("tutorial, own text", ["--recipe", "tutorial"], own_text=True, target=41.0),
    Case("w4a4-w8a8", ["--recipe", "w4a4-w8a8"]),
    Case("w4a4-dynamic", ["--recipe", "w4a4-dynamic"]),
    Case(PLAIN_ALL, ["--recipe", "all-w4a4", "--distill", "0"]),
    Case("all-w4a4", ["--recipe", "all-w4a4"], start=PLAIN_ALL, target=44.0),
    Case("all-w4a4, 64 steps", ["--recipe", "all-w4a4", *LONGER], start=PLAIN_ALL, target=42.0),
)


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
        simulated: perplexity in plain torch from the stored integers, once per perturbation; empty if not requested.
        cost: None where it was not measured.
    """

    case: str
    seed: int
    served: float
    simulated: Sequence[float] = ()
    cost: Cost | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            results.append(_measured(args, case, seed) if case else Result(name, 0, _served(args, args.model)))
            print(json.dumps(asdict(results[-1])), flush=True)
            file.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
            if args.docs:
                args.docs.write_text(page(results, args))
    print(format_table(HEADER, rows(results)))
    if args.docs:
        args.docs.write_text(page(results, args))


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
        simulated = ", ".join(_beside_served(r) for _, r in sorted(runs.items()) if r.simulated)
        costs = [r.cost for r in runs.values() if r.cost]
        cost = ["", "", ""]
        if costs:
            seconds, cpu = mean(c.seconds for c in costs), mean(c.cpu_seconds for c in costs)
            cost = [f"{seconds:.0f}", f"{cpu:.0f}", f"{max(c.peak_bytes for c in costs) / 1e9:.2f}"]
        if name == FLOAT:
            by_seed = [""] * len(SEEDS)
        found.append([name, f"{target:.1f}" if target else "", average, *by_seed, simulated, *cost])
    return found


def _beside_served(result: Result) -> str:
    found = mean(result.simulated)
    return f"{found:.2f} ({100 * (found / result.served - 1):+.1f} %)"


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


def _measured(args: argparse.Namespace, case: Case, seed: int) -> Result:
    output, cost = _quantized(args, case, seed)
    _run(["verify", str(output)])
    served = _served(args, output)
    simulated = _simulated(args, output) if seed in args.simulate else ()
    return Result(case.name, seed, served, simulated, cost)


def _quantized(args: argparse.Namespace, case: Case, seed: int) -> tuple[Path, Cost | None]:
    """The case's checkpoint, made unless it exists, and its cost, None if that is unknown."""
    output = case.output(args.work, seed)
    note = output.with_suffix(".cost.json")
    command = ["quantize", str(args.model), "--output", str(output), "--seed", str(seed), "--resume"]
    options, before = list(case.options), None
    if case.start:
        base = next(c for c in CASES if c.name == case.start)
        start, before = _quantized(args, base, seed)
        recipe = options.index("--recipe")
        options[recipe : recipe + 2] = ["--start-from", str(start)]
    if not case.own_text:
        options += ["--calib-file", str(args.calib_file)]
    if not output.exists():
        cost = _timed([*command, *options])
        if before or not case.start:
            note.write_text(json.dumps(asdict(cost + before if before else cost)))
    return output, Cost(**json.loads(note.read_text())) if note.exists() else None


def _served(args: argparse.Namespace, directory: Path) -> float:
    options = ["--text", str(args.text), "--window", str(WINDOW), "--windows", str(WINDOWS), "--dtype", args.dtype]
    output = _run(["eval", str(directory), *options])
    return float(next(line.split()[1] for line in output.splitlines() if line.startswith(str(directory))))


def _simulated(args: argparse.Namespace, directory: Path) -> list[float]:
    import torch
    from transformers import AutoTokenizer

    from vllm_w4a4_plugin.calibration.data.texts import read_texts
    from vllm_w4a4_plugin.calibration.data.tokens import join_texts
    from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
    from vllm_w4a4_plugin.calibration.simulate import perplexity, quantized_logits

    class Disturbed(StreamedModel):
        by = 0.0

        def start(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
            hidden, arguments = super().start(ids)
            noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
            return hidden * (1 + self.by * noise), arguments

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = join_texts(read_texts(args.text), tokenizer)
    count = min(WINDOWS, len(ids) // WINDOW)
    windows = torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)
    model, found = Disturbed(args.model), []
    for by in DISTURBANCES:
        model.by = by
        found.append(perplexity(quantized_logits(model, directory, windows), windows))
    return found


def _timed(arguments: Sequence[str]) -> Cost:
    """The cost of one command."""
    started = time.monotonic()
    process = subprocess.Popen(_command(arguments), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed with exit code {process.returncode}")
    return Cost(time.monotonic() - started, usage.ru_utime + usage.ru_stime, _peak(usage))


def _peak(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _run(arguments: Sequence[str]) -> str:
    done = subprocess.run(_command(arguments), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed with exit code {done.returncode}")
    return done.stdout


def _command(arguments: Sequence[str]) -> list[str]:
    return [str(Path(sys.executable).parent / "vllm-w4a4"), *arguments]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
