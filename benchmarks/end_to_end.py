# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.end_to_end: vLLM's engine on a model with random weights, float compared with W4A4.

Each variant runs in its own process, one after the other. Measured are load time, prefill, decode and peak memory; with
--profile also where a prefill and the decode steps spend their time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import random_model, report, trace
from .kernels import machine
from .shapes import Model

SHAPES = {
    "Qwen3-4B": (Model("Qwen3-4B", hidden=2560, intermediate=9728, heads=32, kv_heads=8, head_dim=128), 36),
    "Qwen3-0.6B": (Model("Qwen3-0.6B", hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128), 28),
}
DTYPES = {"bfloat16": 2, "float32": 4}
VARIANTS = [f"{recipe} {dtype}" for recipe in random_model.RECIPES for dtype in DTYPES]
"""The plugin itself chooses float32 on CPUs without 16-bit float instructions."""

PREFILL, PROMPT, STEPS = 1024, 2, 8
MOST_REQUESTS = 16


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="Qwen3-4B")
    parser.add_argument("--layers", type=int, help="number of layers (default: as many as the shape has)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument(
        "--directory", type=Path, default=Path("build/benchmarks/models"), help="where the models are written"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="repetitions of each measurement, within a minute; the median is reported",
    )
    parser.add_argument("--profile", action="store_true", help="profile the quantized models as well")
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks/end_to_end.json"))
    parser.add_argument("--docs", type=Path, help="directory for performance-end-to-end.md")
    parser.add_argument(
        "--from-json", type=Path, nargs="+", metavar="FILE", help="do not measure; make the page from these runs"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT", json.dumps(measure(options.directory, options.one, options.repeats, options.profile)))
        return
    results = [json.loads(file.read_text()) for file in options.from_json or []] or [run(options)]
    page = report.end_to_end(results)
    if options.docs:
        (options.docs / "performance-end-to-end.md").write_text(page)
    print(page)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every variant in a fresh process. Returns the contents of the JSON file, which is written after each."""
    options.json.parent.mkdir(parents=True, exist_ok=True)
    model, layers = SHAPES[options.shape]
    layers = options.layers or layers
    result: dict[str, Any] = {"machine": machine(), "model": model.name, "layers": layers, "records": {}}
    for variant in options.variants:
        recipe, dtype = variant.split()
        directory = options.directory / f"{model.name}-{layers}-{recipe}"
        if not (directory / "config.json").exists():
            random_model.make(directory, model, layers, recipe)
        record = _in_a_process(directory, dtype, options.repeats, options.profile and recipe != "float")
        record["step_bytes"] = random_model.step_bytes(model, layers, recipe, DTYPES[dtype])
        result["records"][variant] = record
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(variant, {key: value for key, value in record.items() if not isinstance(value, dict)}, flush=True)
    return result


def _in_a_process(directory: Path, dtype: str, repeats: int, profile: bool) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "benchmarks.end_to_end", "--one", dtype, "--directory", str(directory),
        "--repeats", str(repeats), *(["--profile"] if profile else []),
    ]  # fmt: skip
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Compute on all cores. By default vLLM reserves one for its scheduler, which is half of a small machine.
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        **os.environ,
    }
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def measure(directory: Path, dtype: str, repeats: int, profile: bool) -> dict[str, Any]:
    """Measure one engine: times in seconds, and peak memory of the process that holds the model in bytes."""
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as traces:
        llm = LLM(
            str(directory), dtype=dtype, skip_tokenizer_init=True, max_model_len=PREFILL + 64,
            max_num_batched_tokens=PREFILL + 64, max_num_seqs=MOST_REQUESTS, enable_prefix_caching=False,
            gpu_memory_utilization=0.3,
            profiler_config={"profiler": "torch", "torch_profiler_dir": traces} if profile else None,
        )  # fmt: skip
        result: dict[str, Any] = {"ready": time.perf_counter() - begin, "memory": _peak_memory()}

        def seconds(batch: int, prompt: int, tokens: int) -> float:
            prompts = [{"prompt_token_ids": [(7 * i + 13 * j) % 100000 for i in range(prompt)]} for j in range(batch)]
            parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            llm.generate(prompts, parameters, use_tqdm=False)
            return time.perf_counter() - start

        def step(batch: int) -> float:
            return (seconds(batch, PROMPT, STEPS + 1) - seconds(batch, PROMPT, 1)) / STEPS

        seconds(1, PROMPT, 2)
        result["prefill"] = _median(lambda: seconds(1, PREFILL, 1), repeats)
        result["decode 1"] = _median(lambda: step(1), repeats)
        result["decode 16"] = _median(lambda: step(MOST_REQUESTS), repeats)
        result["memory"] = max(result["memory"], _peak_memory())
        if profile:
            result["profile prefill"] = _profiled(llm, traces, lambda: seconds(1, PREFILL, 1))
            result["profile decode 1"] = _profiled(llm, traces, lambda: seconds(1, PROMPT, STEPS + 1))
    return result


def _median(run: Callable[[], float], repeats: int) -> float:
    """Median of `repeats` runs, or of those that were started within a minute."""
    end, values = time.perf_counter() + 60, [run()]
    while len(values) < repeats and time.perf_counter() < end:
        values.append(run())
    return statistics.median(values)


def _profiled(llm: Any, directory: str, work: Callable[[], object]) -> dict[str, float]:
    before = set(Path(directory).rglob("*.json*"))
    llm.start_profile()
    work()
    llm.stop_profile()
    # The worker writes its trace, and the engine's front end one without operators.
    written = set(Path(directory).rglob("*.json*")) - before
    return trace.self_times(max(written, key=lambda file: file.stat().st_size))


def _peak_memory() -> int:
    """Peak resident memory of the largest process of this engine, in bytes."""
    import psutil

    peaks = []
    for process in psutil.Process().children(recursive=True):
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peaks += [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")]
    return max(peaks)


if __name__ == "__main__":
    main()
