# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine of the end-to-end benchmark, in its own process: `python -m benchmarks.engine DIRECTORY DTYPE`."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import trace
from .workload import MOST_REQUESTS, PREFILL, PROMPT, RESULT, STEPS, peak_memory, tokens_of

MODES: dict[bool | None, dict[str, Any]] = {
    None: {},
    True: {"enforce_eager": True},
    False: {"compilation_config": {"mode": "VLLM_COMPILE"}},
}


def measure(directory: Path, dtype: str, profile: bool, eager: bool | None) -> dict[str, Any]:
    """Measure one engine: times in seconds, and peak memory of the process that holds the model in bytes.

    Args:
        eager: whether vLLM compiles the model; None leaves it to vLLM and the platform.
    """
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as traces:
        llm = LLM(
            str(directory), dtype=dtype, skip_tokenizer_init=True, max_model_len=PREFILL + 64,
            max_num_batched_tokens=PREFILL + 64, max_num_seqs=MOST_REQUESTS, enable_prefix_caching=False,
            gpu_memory_utilization=0.3, **MODES[eager],
            profiler_config={"profiler": "torch", "torch_profiler_dir": traces} if profile else None,
        )  # fmt: skip
        result: dict[str, Any] = {"ready": time.perf_counter() - begin, "memory": peak_memory()}

        def seconds(batch: int, prompt: int, tokens: int) -> float:
            prompts = [{"prompt_token_ids": tokens_of(j, prompt)} for j in range(batch)]
            parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            llm.generate(prompts, parameters, use_tqdm=False)
            return time.perf_counter() - start

        def step(batch: int) -> float:
            return (seconds(batch, PROMPT, STEPS + 1) - seconds(batch, PROMPT, 1)) / STEPS

        seconds(1, PROMPT, 2)
        result["prefill"] = seconds(1, PREFILL, 1)
        result["decode 1"] = step(1)
        result["decode 16"] = step(MOST_REQUESTS)
        result["memory"] = max(result["memory"], peak_memory())
        if profile:
            result["profile prefill"] = _profiled(llm, traces, lambda: seconds(1, PREFILL, 1))
            for batch in (1, MOST_REQUESTS):
                work = partial(seconds, batch, PROMPT, STEPS + 1)
                result[f"profile decode {batch}"] = _profiled(llm, traces, work)
    return result


def _profiled(llm: Any, directory: str, work: Callable[[], object]) -> dict[str, float]:
    before = set(Path(directory).rglob("*.json*"))
    llm.start_profile()
    work()
    llm.stop_profile()
    # The worker writes its trace, and the engine's front end one without operators.
    written = set(Path(directory).rglob("*.json*")) - before
    return trace.self_times(max(written, key=lambda file: file.stat().st_size))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction)
    options = parser.parse_args()
    print(RESULT + json.dumps(measure(options.directory, options.dtype, options.profile, options.eager)))
