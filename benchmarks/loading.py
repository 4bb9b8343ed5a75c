# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.loading: seconds per GB of a checkpoint's files, from the disk cache to weights that are packed.

The checkpoint has random weights, some layers of the shape of Qwen3-32B, and few tokens in its vocabulary, so that the
layers have the share of the files that they have in the whole model. vLLM's loader loads it in a process of its own,
with one thread and with all. What it takes includes making the model and every check. Beside it, as many threads read
the same files and keep nothing: no loader can be faster than that.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import publishing, random_model, report
from .kernels import machine
from .shapes import MODELS
from .workload import RESULT

MODEL = replace(next(model for model in MODELS if model.name == "Qwen3-32B"), vocabulary=4096)
RECIPES = ("all-w4a4", "tutorial")
PIECE = 4 << 20
"""Bytes that are read at a time: what stays in the caches of a core."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--directory", type=Path, default=Path("build/benchmarks/models"))
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks/loading.json"))
    parser.add_argument("--docs", type=Path, help="directory for performance/loading.md")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # the process of one checkpoint
    options = parser.parse_args()
    if options.one:
        print(RESULT + json.dumps(measure(options.one, options.rounds)))
        return
    result = run(options)
    publishing.publish(result, page(result), options.json, options.docs, "performance/loading.md")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every recipe with one thread and with all. Returns the contents of the JSON file."""
    result: dict[str, Any] = {"machine": machine(), "layers": options.layers, "records": []}
    for recipe in options.recipes:
        checkpoint = options.directory / f"{MODEL.name}-{options.layers}-{recipe}-small-vocabulary"
        if not (checkpoint / "config.json").exists():
            random_model.make(checkpoint, MODEL, options.layers, recipe)
        for threads in sorted({1, result["machine"]["threads"]}):
            command = [sys.executable, "-m", "benchmarks.loading", "--one", str(checkpoint)]
            environment = {
                "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", **os.environ, "OMP_NUM_THREADS": str(threads)
            }  # fmt: skip
            ended = subprocess.run(
                [*command, "--rounds", str(options.rounds)], env=environment, stdout=subprocess.PIPE, text=True
            )
            lines = [line for line in ended.stdout.splitlines() if line.startswith(RESULT)]
            if not lines:
                raise RuntimeError(f"loading {checkpoint} ended with exit code {ended.returncode}")
            record = json.loads(lines[0].removeprefix(RESULT))
            result["records"].append({"recipe": recipe, "threads": threads, **record})
    return result


def measure(checkpoint: Path, rounds: int) -> dict[str, Any]:
    """Bytes of the files, and for each round the seconds of reading and of loading them."""
    import torch

    files = sorted(checkpoint.glob("*.safetensors"))
    threads = torch.get_num_threads()
    found: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in files), "read": [], "load": []}
    read(files, threads)  # into the disk cache
    load(checkpoint)  # imports, and memory that later loads find again
    for _ in range(rounds):
        for name, seconds in (("read", read(files, threads)), ("load", load(checkpoint))):
            found[name].append(seconds)
    return found


def read(files: list[Path], threads: int) -> float:
    """Seconds in which the threads read all files, each piece over the last one."""

    def take(first: int) -> None:
        buffer = memoryview(bytearray(PIECE))
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                for offset in range(first * PIECE, file.stat().st_size, threads * PIECE):
                    os.preadv(descriptor, [buffer], offset)
            finally:
                os.close(descriptor)

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(take, range(threads)))
    return time.perf_counter() - begin


def load(checkpoint: Path) -> float:
    """Seconds in which vLLM's loader makes a model of the files, in this process."""
    from unittest.mock import patch

    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    config = EngineArgs(
        model=str(checkpoint), max_model_len=128, dtype="bfloat16", quantization="ascend", skip_tokenizer_init=True
    ).create_engine_config()
    # vLLM's loader empties the accelerator's cache; its CPU worker, absent here, takes care that there is one.
    with patch("torch.accelerator.empty_cache"), set_current_vllm_config(config):
        try:
            init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
            ensure_model_parallel_initialized(1, 1, backend="gloo")
            begin = time.perf_counter()
            model = get_model(vllm_config=config)
            seconds = time.perf_counter() - begin
            del model
        finally:
            cleanup_dist_env_and_memory()
            gc.collect()
    return seconds


def page(result: dict[str, Any]) -> str:
    """The page docs/performance/loading.md."""
    rounds = max(len(record["load"]) for record in result["records"])
    lines = [
        "# Loading a large checkpoint",
        "",
        f"{result['layers']} layers of the shape of {MODEL.name}, a vocabulary of {MODEL.vocabulary} tokens, loaded "
        f"by vLLM in bfloat16. One run of {rounds} rounds, {report.origin(result['machine'])} Generated by "
        "`python -m benchmarks.loading`; do not edit.",
        "",
        "The files are in the disk cache. Loading includes making the model, all checks, packing, and whatever vLLM "
        "does to layers in float. Reading is that of the same files by as many threads, which keep nothing. Figures "
        "are medians; a ratio is the median of the ratios within a round.",
        "",
        "| recipe | threads | files, GB | loading, s per GB | reading, s per GB | reading / loading |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in result["records"]:
        size = record["bytes"] / 1e9
        ratio = statistics.median(a / b for a, b in zip(record["read"], record["load"], strict=True))
        lines.append(
            f"| {record['recipe']} | {record['threads']} | {size:.2f} | {statistics.median(record['load']) / size:.2f} "
            f"| {statistics.median(record['read']) / size:.2f} | {ratio:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
