# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.attention: what vLLM's attention takes of a long prompt, and what its options change.

One layer of the shape of Qwen3-4B, all in W4A4. Shares are those of a profiled engine. Options are measured on the
operator alone, with the keys and values of one request: the tokens of a block of the cache, the dtype, and the tokens
that vLLM computes at a time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import publishing, random_model, report, trace
from .end_to_end import SHAPES
from .kernels import import_vllm_kernels, machine
from .measure import interleaved, median_ratio
from .workload import RESULT, tokens_of

if TYPE_CHECKING:
    import torch

MODEL = SHAPES["Qwen3-4B"][0]
LENGTHS = (1024, 4096, 16384)
DTYPES = ("bfloat16", "float32")
ATTENTION = "cpu_attention_with_kv_cache"
LINEAR = "vllm_w4a4::"
OPTION_TOKENS = 4096
DEFAULT = {"block": 128, "step": 4096, "dtype": "bfloat16"}
"""What vLLM does by itself, on a CPU with instructions for bfloat16."""

BLOCKS = (16, 32, 64, 128, 256, 1024)
STEPS = (512, 2048, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the options take turns")
    parser.add_argument("--directory", type=Path, default=Path("build/benchmarks/models"))
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks/attention.json"))
    parser.add_argument("--docs", type=Path, help="directory for performance/long-prompts.md")
    parser.add_argument("--engine", nargs=2, metavar=("DIR", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        print(RESULT + json.dumps(profile(Path(options.engine[0]), options.engine[1], options.lengths)))
        return
    result = run(options)
    publishing.publish(result, page(result), options.json, options.docs, "performance/long-prompts.md")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Shares in an engine of each dtype, then the options. Returns the contents of the JSON file."""
    result: dict[str, Any] = {"machine": machine(), "shares": {}}
    checkpoint = options.directory / f"{MODEL.name}-1-all-w4a4"
    if not (checkpoint / "config.json").exists():
        random_model.make(checkpoint, MODEL, 1, "all-w4a4")
    for dtype in DTYPES:
        command = [sys.executable, "-m", "benchmarks.attention", "--engine", str(checkpoint), dtype, "--lengths"]
        ended = subprocess.run([*command, *map(str, options.lengths)], stdout=subprocess.PIPE, text=True)
        lines = [line for line in ended.stdout.splitlines() if line.startswith(RESULT)]
        if not lines:
            raise RuntimeError(f"the engine in {dtype} ended with exit code {ended.returncode}")
        result["shares"][dtype] = json.loads(lines[0].removeprefix(RESULT))
    result["options"] = measure_options(options.seconds)
    return result


def profile(checkpoint: Path, dtype: str, lengths: list[int]) -> list[dict[str, float]]:
    """Seconds of a prompt of each length, and the shares of attention and of our linear layers."""
    from vllm import LLM, SamplingParams

    found = []
    with tempfile.TemporaryDirectory() as traces:
        llm = LLM(
            str(checkpoint), dtype=dtype, skip_tokenizer_init=True, max_model_len=max(lengths) + 64, max_num_seqs=1,
            enable_prefix_caching=False, profiler_config={"profiler": "torch", "torch_profiler_dir": traces},
        )  # fmt: skip
        parameters = SamplingParams(temperature=0, max_tokens=1, detokenize=False)

        def prompt(length: int) -> float:
            begin = time.perf_counter()
            llm.generate([{"prompt_token_ids": tokens_of(0, length)}], parameters, use_tqdm=False)
            return time.perf_counter() - begin

        prompt(64)
        for length in lengths:
            before = set(Path(traces).rglob("*.json*"))
            llm.start_profile()
            seconds = prompt(length)
            llm.stop_profile()
            written = set(Path(traces).rglob("*.json*")) - before
            times = trace.self_times(max(written, key=lambda file: file.stat().st_size))
            shares = {
                "attention": sum(share for name, share in times.items() if ATTENTION in name),
                "linears": sum(share for name, share in times.items() if name.startswith(LINEAR)),
            }
            found.append({"tokens": length, "seconds": seconds, **shares})
    return found


def measure_options(seconds: float) -> list[dict[str, Any]]:
    """Every option beside `DEFAULT`, in turn: its value, median seconds and the median ratio to the default."""
    import_vllm_kernels()
    settings = [
        DEFAULT,
        *({**DEFAULT, "block": block} for block in BLOCKS if block != DEFAULT["block"]),
        *({**DEFAULT, "step": step} for step in STEPS if step != DEFAULT["step"]),
        *({**DEFAULT, "dtype": "float32", "block": block} for block in (16, 128)),
    ]
    names = [json.dumps(setting) for setting in settings]
    times = interleaved(
        {name: attention(**setting) for name, setting in zip(names, settings, strict=True)}, seconds, least=3
    )
    base = times[names[0]]
    return [
        {**setting, "seconds": statistics.median(times[name]), "speedup": median_ratio(base, times[name])}
        for name, setting in zip(names, settings, strict=True)
    ]


def attention(block: int, step: int, dtype: str, tokens: int = OPTION_TOKENS) -> "Callable[[], torch.Tensor]":
    """Computes a prompt in one layer of vLLM's attention, `step` tokens at a time, with what vLLM does before it."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, size = MODEL.heads, MODEL.kv_heads, MODEL.head_dim
    query, key, value = (
        torch.randn(tokens, count, size, generator=generator).to(kind) for count in (heads, kv_heads, kv_heads)
    )
    isa = _get_attn_isa(kind, block, size)
    cache = torch.zeros(-(-tokens // block), kv_heads, 2 * block, size, dtype=kind)
    keys, values = cache.chunk(2, dim=2)
    table = torch.arange(len(cache), dtype=torch.int32)[None]
    output = torch.empty_like(query)

    def compute() -> torch.Tensor:
        for first, last in ((first, min(first + step, tokens)) for first in range(0, tokens, step)):
            starts = torch.tensor([0, last - first], dtype=torch.int32)
            lengths = torch.tensor([last], dtype=torch.int32)
            plan = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=size, seq_lens=lengths, dtype=kind,
                query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa, enable_kv_split=True,
            )  # fmt: skip
            slots = torch.arange(first, last)
            ops.cpu_attn_reshape_and_cache(key[first:last], value[first:last], keys, values, slots, isa)
            ops.cpu_attention_with_kv_cache(
                query[first:last], keys, values, output[first:last], starts, lengths, size**-0.5, True, None, -1,
                table, 0.0, plan, None,
            )  # fmt: skip
        return output

    return compute


def page(result: dict[str, Any]) -> str:
    """The page docs/performance/long-prompts.md."""
    lines = [
        "# Long prompts",
        "",
        f"What vLLM's attention takes of a prompt: one layer of the shape of {MODEL.name}, all linear layers in W4A4. "
        f"One run, {report.origin(result['machine'])} Generated by `python -m benchmarks.attention`; do not edit.",
        "",
        "The engine is profiled, one prompt of each length. The rest are norms, rotary embeddings, SiLU and vLLM.",
        "",
        "| dtype | tokens | seconds per layer | attention | our linear layers | rest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for dtype, records in result["shares"].items():
        for record in records:
            rest = 1 - record["attention"] - record["linears"]
            lines.append(
                f"| {dtype} | {record['tokens']} | {record['seconds']:.2f} | {record['attention']:.0%} "
                f"| {record['linears']:.0%} | {rest:.0%} |"
            )
    default = result["options"][0]
    lines += [
        "",
        f"## Options of vLLM's attention, {OPTION_TOKENS} tokens",
        "",
        f"The operator alone, all settings in turn. By default ({default['seconds']:.2f} s) vLLM's cache has blocks of "
        f"{DEFAULT['block']} tokens (`--block-size`), and up to {DEFAULT['step']} tokens of a prompt are computed at a "
        "time (`--max-num-batched-tokens`). A speedup is the median of the ratios within a round.",
        "",
        "| tokens of a block | tokens at a time | dtype | speedup over the default |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {r['block']} | {r['step']} | {r['dtype']} | {r['speedup']:.2f}x |" for r in result["options"][1:]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
