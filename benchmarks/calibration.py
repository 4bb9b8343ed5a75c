# SPDX-License-Identifier: Apache-2.0
"""Quality of `vllm-w4a4 quantize` over seeds: every figure from a saved checkpoint, verified and served by vLLM.

python -m benchmarks.calibration MODEL --text FILE --calib-file FILE --work DIR [--docs docs/calibration.md]

Results are kept in WORK/results.json after every run; a run found there is not repeated.
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
from statistics import mean

from vllm_w4a4_plugin.text import format_table

WINDOW, WINDOWS = 512, 24


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: shown. options: of `vllm-w4a4 quantize`. own_text: calibrate on what the model writes.
    """

    name: str
    options: Sequence[str]
    own_text: bool = False


OWN_TEXT = ["--calib-tokens", "8192", "--seq-len", "256"]
CASES = (
    Case("tutorial", ["--recipe", "tutorial"]),
    Case("tutorial, not distilled", ["--recipe", "tutorial", "--distill", "0"]),
    Case("tutorial, best", ["--recipe", "tutorial", "--distill", "34"]),
    Case("w4a4-w8a8", ["--recipe", "w4a4-w8a8"]),
    Case("all-w4a4", ["--recipe", "all-w4a4"]),
    Case("all-w4a4, best", ["--recipe", "all-w4a4", "--distill", "34"]),
    Case("tutorial, own text", ["--recipe", "tutorial", *OWN_TEXT], own_text=True),
)


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        case, seed: of the run; "float" is the model before quantization.
        served: perplexity through vLLM. simulated: in plain torch from the stored codes, None if not asked for.
        seconds, cpu_seconds: of `vllm-w4a4 quantize`, start of Python included.
        peak_bytes: its largest resident memory.
    """

    case: str
    seed: int
    served: float
    simulated: float | None = None
    seconds: float = 0
    cpu_seconds: float = 0
    peak_bytes: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="float model")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument("--calib-file", type=Path, required=True, help="calibration text")
    parser.add_argument("--case", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--simulate", type=int, nargs="*", default=[0], help="seeds to simulate as well (default: 0)")
    parser.add_argument("--dtype", default="float32", help="of served activations (default: float32)")
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints and results.json")
    parser.add_argument("--docs", type=Path, help="write the tables there, as Markdown")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "results.json"
    results = [Result(**r) for r in json.loads(file.read_text())] if file.exists() else []
    wanted = [(None, 0), *((case, seed) for case in CASES if case.name in args.case for seed in args.seeds)]
    for case, seed in wanted:
        name = case.name if case else "float"
        if not any(r.case == name and r.seed == seed for r in results):
            results.append(_quantized(args, case, seed) if case else Result(name, 0, _served(args, args.model)))
            print(json.dumps(asdict(results[-1])), flush=True)
            file.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    print(table(results))
    if args.docs:
        args.docs.write_text(page(results, args))


def table(results: Sequence[Result], separator: str | None = None) -> str:
    """Means and single seeds per case, as text or, with a separator, as rows of Markdown."""
    header = ("case", "perplexity, mean", "by seed", "simulated, first", "seconds", "CPU seconds", "peak GB")
    rows = []
    for name in dict.fromkeys(r.case for r in results):
        runs = sorted((r for r in results if r.case == name), key=lambda r: r.seed)
        simulated = next((f"{r.simulated:.2f}" for r in runs if r.simulated), "")
        costs = ["", "", ""]
        timed = [r for r in runs if r.seconds]
        if timed:
            costs = [f"{mean(r.seconds for r in timed):.0f}", f"{mean(r.cpu_seconds for r in timed):.0f}"]
            costs.append(f"{max(r.peak_bytes for r in runs) / 1e9:.2f}")
        seeds = ", ".join(f"{r.seed}: {r.served:.2f}" for r in runs) if name != "float" else ""
        rows.append([name, f"{mean(r.served for r in runs):.2f}", seeds, simulated, *costs])
    if separator is None:
        return format_table(header, rows)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(separator + f" {separator} ".join(line) + separator for line in lines)


def page(results: Sequence[Result], args: argparse.Namespace) -> str:
    """The Markdown page."""
    import torch

    commands = "\n".join(
        f"| {case.name} | `{' '.join(case.options)}`{'' if case.own_text else ', with --calib-file'} |"
        for case in CASES
    )
    return (
        "# Quality of the calibration, measured\n\n"
        f"`python -m benchmarks.calibration` on {time.strftime('%Y-%m-%d', time.gmtime())}, model `{args.model.name}`, "
        f"{_processor()}, {os.cpu_count()} cores, torch {torch.__version__}. Perplexity over {WINDOWS} windows of "
        f"{WINDOW} tokens of `{args.text.name}` through vLLM with {args.dtype} activations; calibration text "
        f"`{args.calib_file.name}`. Every figure comes from a saved checkpoint that `vllm-w4a4 verify` accepts.\n\n"
        + table(results, "|")
        + "\n\nOptions of `vllm-w4a4 quantize`, beside `--seed`:\n\n| case | options |\n|---|---|\n"
        + commands
        + "\n"
    )


def _quantized(args: argparse.Namespace, case: Case, seed: int) -> Result:
    output = args.work / f"{case.name.replace(', ', '-').replace(' ', '-')}-{seed}"
    command = ["quantize", str(args.model), "--output", str(output), "--seed", str(seed), *case.options]
    if not case.own_text:
        command += ["--calib-file", str(args.calib_file)]
    seconds = cpu = 0.0
    peak = 0
    if not output.exists():
        seconds, cpu, peak = _timed(command)
    _run(["verify", str(output)])
    served = _served(args, output)
    simulated = _simulated(args, output) if seed in args.simulate else None
    return Result(case.name, seed, served, simulated, seconds, cpu, peak)


def _served(args: argparse.Namespace, directory: Path) -> float:
    options = ["--text", str(args.text), "--window", str(WINDOW), "--windows", str(WINDOWS), "--dtype", args.dtype]
    output = _run(["eval", str(directory), *options])
    return float(next(line.split()[1] for line in output.splitlines() if line.startswith(str(directory))))


def _simulated(args: argparse.Namespace, directory: Path) -> float:
    import torch
    from transformers import AutoTokenizer

    from vllm_w4a4_plugin.calibration.data import SEPARATOR, read_texts
    from vllm_w4a4_plugin.calibration.model import StreamedModel
    from vllm_w4a4_plugin.calibration.simulate import perplexity, quantized_logits

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(SEPARATOR.join(read_texts(args.text)), add_special_tokens=False, verbose=False).input_ids
    count = min(WINDOWS, len(ids) // WINDOW)
    windows = torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)
    return perplexity(quantized_logits(StreamedModel(args.model), directory, windows), windows)


def _timed(arguments: Sequence[str]) -> tuple[float, float, int]:
    """Seconds, CPU seconds and peak resident bytes of one command."""
    started = time.monotonic()
    process = subprocess.Popen(_command(arguments), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed with exit code {process.returncode}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, _peak(usage)


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
