# SPDX-License-Identifier: Apache-2.0
"""Quality of `vllm-w4a4 quantize` over seeds: quantize, verify, simulate in torch, measure through vLLM, one table.

python benchmarks/calibration.py MODEL --text wiki-dev.json --calib-file calibration-32.json --work DIR
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoTokenizer

from vllm_w4a4_plugin.calibration.data import SEPARATOR, read_texts
from vllm_w4a4_plugin.calibration.model import StreamedModel
from vllm_w4a4_plugin.calibration.simulate import float_logits, perplexity, quantized_logits
from vllm_w4a4_plugin.text import format_table

WINDOW, WINDOWS = 512, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="float model")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument("--calib-file", type=Path, help="calibration text; without it the model writes its own")
    parser.add_argument("--recipe", nargs="+", default=["tutorial"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints and results.json")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of quantize")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(SEPARATOR.join(read_texts(args.text)), add_special_tokens=False, verbose=False).input_ids
    count = min(WINDOWS, len(ids) // WINDOW)
    windows = torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)
    results = [{"recipe": "float", "simulated": perplexity(float_logits(StreamedModel(args.model), windows), windows)}]
    for recipe in args.recipe:
        for seed in args.seeds:
            results.append(_one(args, recipe, seed, windows))
            print(json.dumps(results[-1]), flush=True)
        mine = [r for r in results if r["recipe"] == recipe]
        results.append({"recipe": f"{recipe}, mean", **{k: mean(r[k] for r in mine) for k in _MEASURED}})
    (args.work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    rows = [[str(r["recipe"]), str(r.get("seed", "")), *(_number(r.get(k)) for k in _MEASURED)] for r in results]
    print(format_table(("recipe", "seed", *_MEASURED), rows))


_MEASURED = ("seconds", "cpu_seconds", "simulated", "vllm")


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else ""


def _one(args: argparse.Namespace, recipe: str, seed: int, windows: torch.Tensor) -> dict[str, object]:
    import resource

    output = args.work / f"{recipe}-{seed}"
    command = ["quantize", str(args.model), "--output", str(output), "--recipe", recipe, "--seed", str(seed)]
    if args.calib_file:
        command += ["--calib-file", str(args.calib_file)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    _run([*command, *args.options])
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    _run(["verify", str(output)])
    simulated = perplexity(quantized_logits(StreamedModel(args.model), output, windows), windows)
    table = _run(["eval", str(output), "--text", str(args.text), "--windows", str(WINDOWS)])
    served = float(next(line.split()[1] for line in table.splitlines() if line.startswith(str(output))))
    return {
        "recipe": recipe, "seed": seed, "seconds": seconds, "cpu_seconds": cpu, "simulated": simulated, "vllm": served
    }  # fmt: skip


def _run(arguments: list[str]) -> str:
    command = [str(Path(sys.executable).parent / "vllm-w4a4"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
