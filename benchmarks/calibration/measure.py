# SPDX-License-Identifier: Apache-2.0
"""Quantizing, verifying and serving with the commands that users run, and simulating."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases import CASES, Case
from .results import Cost, Result

WINDOW, WINDOWS = 512, 24
# A simulation is repeated with this much relative noise on the embeddings: single roundings to 4 bits depend on the
# last bit of the arithmetic and change everything after them, so one run says little about a difference of 1 %.
DISTURBANCES = (0, 1e-6, 2e-6, 3e-6)


def measured(args: argparse.Namespace, case: Case, seed: int) -> Result:
    """One run: quantize, verify, serve and, if requested, simulate."""
    output, cost = _quantized(args, case, seed)
    _run(["verify", str(output)])
    perplexity = served(args, output)
    simulated = _simulated(args, output) if seed in args.simulate else ()
    return Result(case.name, seed, perplexity, simulated, cost)


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


def served(args: argparse.Namespace, directory: Path) -> float:
    """Perplexity of a model through vLLM, by `vllm-w4a4 eval`."""
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
