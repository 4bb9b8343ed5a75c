# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.end_to_end: engines on a model with random weights, W4A4 beside what one would use instead.

Contestants are vLLM with the W4A4 recipes, with the unquantized model and with its own int4 layers (GPTQ), and
llama.cpp. Each runs in its own process, one after the other, for several rounds. Measured are load time, prefill,
decode and peak memory; with --profile also where a prefill and the decode steps spend their time.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import llama, publishing, random_model, report
from . import profile as profiles
from .kernels import machine
from .shapes import EXPERTS, MODELS, Model
from .workload import RESULT

SHAPES = {
    "Qwen3-4B": (Model("Qwen3-4B", hidden=2560, intermediate=9728, heads=32, kv_heads=8, head_dim=128), 36),
    "Qwen3-0.6B": (Model("Qwen3-0.6B", hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128), 28),
    "Qwen3-30B-A3B": (
        Model("Qwen3-30B-A3B", hidden=2048, intermediate=768, heads=32, kv_heads=4, head_dim=128, experts=EXPERTS[0]),
        48,
    ),
    "SmolLM2-135M": (next(model for model in MODELS if model.name == "SmolLM2-135M"), 30),
}
DTYPES = {"bfloat16": 2, "float32": 4}
LLAMA = "llama.cpp Q4_0"
VARIANTS = [
    *(f"{recipe} {dtype}" for recipe in random_model.RECIPES for dtype in DTYPES),
    f"{random_model.GPTQ} bfloat16",
    LLAMA,
]
"""The plugin itself chooses float32 on CPUs without 16-bit float instructions."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="Qwen3-4B")
    parser.add_argument("--layers", type=int, help="number of layers (default: as many as the shape has)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument(
        "--directory", type=Path, default=Path("build/benchmarks/models"), help="where the models are written"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all variants; medians are reported")
    parser.add_argument("--profile", action="store_true", help="profile the quantized models as well")
    parser.add_argument(
        "--eager", action=argparse.BooleanOptionalAction, help="run vLLM's models without or with compilation"
    )
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks/end_to_end.json"))
    parser.add_argument(
        "--docs", type=Path, help="directory for performance-end-to-end.md, or -experts.md of models with experts"
    )
    parser.add_argument(
        "--from-json", type=Path, nargs="+", metavar="FILE", help="do not measure; make the page from these runs"
    )
    options = parser.parse_args()
    results = [json.loads(file.read_text()) for file in options.from_json or []] or [run(options)]
    if options.docs:
        publishing.refuse_if([fault for result in results for fault in publishing.load_faults(result["machine"])])
        for suffix, of in by_page(results).items():
            (options.docs / f"performance-end-to-end{suffix}.md").write_text(report.end_to_end(of))
    print(report.end_to_end(results))


def by_page(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The results by the suffix of their page's name: models with experts have a page of their own."""
    pages: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        has_experts = SHAPES[result["model"]][0].experts is not None
        pages.setdefault(report.EXPERTS_SUFFIX if has_experts else "", []).append(result)
    return pages


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every variant in a fresh process, in rounds. Returns the contents of the JSON file, which is written
    after each."""
    options.json.parent.mkdir(parents=True, exist_ok=True)
    model, layers = SHAPES[options.shape]
    layers = options.layers or layers
    result: dict[str, Any] = {"machine": machine(), "model": model.name, "layers": layers, "records": {}}
    result["unavailable"] = {}
    for number in range(options.rounds):
        profile = options.profile and number == 0
        for variant in [v for v in options.variants if v not in result["unavailable"]]:
            try:
                record = measure(variant, model, layers, options.directory, options.eager, profile)
            except Unavailable as reason:
                result["unavailable"][variant] = str(reason)
                print(variant, "is left out:", reason, flush=True)
                continue
            result["records"].setdefault(variant, []).append(record)
            options.json.write_text(json.dumps(result, indent=1) + "\n")
            print(variant, {key: value for key, value in record.items() if not isinstance(value, dict)}, flush=True)
    return result


class Unavailable(RuntimeError):
    """A contestant does not run here; the text says why."""


def measure(
    variant: str, model: Model, layers: int, directory: Path, eager: bool | None, profile: bool
) -> dict[str, Any]:
    """One round of one variant, whose model is written first if it is not there.

    Raises:
        Unavailable: its process fails, for example because vLLM has no such kernel for this CPU.
    """
    if variant == LLAMA:
        file = directory / f"{model.name}-{layers}.gguf"
        try:
            llama.install()
        except llama.LlamaUnavailable as reason:
            raise Unavailable(str(reason)) from None
        if not file.exists():
            llama.write(file, model, layers)
        record = _in_a_process("benchmarks.llama", str(file), str(torch.get_num_threads()))
        return record | {"step_bytes": llama.step_bytes(model, layers)}
    recipe, dtype = variant.split()
    if model.experts is not None and random_model.splits_experts(recipe):
        raise Unavailable("gate, up and down of experts must have one type")
    checkpoint = directory / f"{model.name}-{layers}-{recipe}"
    if not (checkpoint / "config.json").exists():
        random_model.make(checkpoint, model, layers, recipe)
    flags = ["--profile"] if profile and recipe not in ("float", random_model.GPTQ) else []
    if eager is not None:
        flags.append("--eager" if eager else "--no-eager")
    record = _in_a_process("benchmarks.engine", str(checkpoint), dtype, *flags)
    if "--profile" in flags:
        record["quantize share"] = profiles.quantize_shares(model)
    return record | {"step_bytes": random_model.step_bytes(model, layers, recipe, DTYPES[dtype])}


def _in_a_process(module: str, *arguments: str) -> dict[str, Any]:
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Compute on all cores. By default vLLM reserves one for its scheduler, which is half of a small machine.
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        **os.environ,
    }
    command: Sequence[str] = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    lines = [line for line in ended.stdout.splitlines() if line.startswith(RESULT)]
    if ended.returncode != 0 or not lines:
        raise Unavailable(f"its process ended with exit code {ended.returncode}")
    return json.loads(lines[0].removeprefix(RESULT))


if __name__ == "__main__":
    main()
