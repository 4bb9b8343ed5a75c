# SPDX-License-Identifier: Apache-2.0
"""A model in a vLLM engine inside this process, and the whole distributions that it predicts."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.constants import DESCRIPTION_FILE, METHOD


class Served:
    """A model that vLLM serves.

    Args:
        llm: vLLM's engine, in this process.
        directory: of the model.
        max_length: tokens of the longest prompt with its answer.
    """

    def __init__(self, llm: Any, directory: Path, max_length: int) -> None:
        self.llm, self.directory, self.max_length = llm, directory, max_length

    def log_probabilities(self, tokens: Sequence[int]) -> torch.Tensor:
        """float32 [len(tokens) - 1, vocabulary]: the prediction of every token but the first.

        vLLM computes all of them to return those of the prompt's tokens; what it returns itself, Python objects for
        the whole vocabulary, takes minutes for a window.
        """
        from vllm import SamplingParams

        found: list[torch.Tensor] = []
        runner = self.llm.collective_rpc(_model_runner)[0]
        gather = runner.sampler.gather_logprobs

        def keep(scores: torch.Tensor, count: int, targets: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append(scores.float().cpu())
            return gather(scores, count, targets, *args, **kwargs)

        runner.sampler.gather_logprobs = keep
        try:
            parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
            self.llm.generate([{"prompt_token_ids": list(tokens)}], parameters, use_tqdm=False)
        finally:
            del runner.sampler.gather_logprobs
        result = torch.cat(found) if found else torch.empty(0, 0)
        if len(result) != len(tokens) - 1:
            raise CheckpointError(
                f"{self.directory}: expected {len(tokens) - 1} predictions of vLLM, found {len(result)}. This version "
                "of vLLM computes log probabilities of prompts in a way that `vllm-w4a4 eval` does not know."
            )
        return result


def _model_runner(worker: Any) -> Any:
    return worker.model_runner


@contextmanager
def served(directory: Path, dtype: str, max_length: int) -> Iterator[Served]:
    """A model in an engine in this process, which is shut down at the end.

    Args:
        directory: of the model; if it has a quantization description, this plugin serves it.
        dtype: of activations.
        max_length: tokens of the longest prompt with its answer.
    """
    space = envs.snapshot().get("VLLM_CPU_KVCACHE_SPACE", "1")
    with envs.assigned({"VLLM_CPU_KVCACHE_SPACE": space, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}):
        llm = _engine(directory, dtype, max_length)
    try:
        yield Served(llm, directory, max_length)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def _engine(directory: Path, dtype: str, max_length: int) -> Any:
    from vllm import LLM

    quantized = (directory / DESCRIPTION_FILE).is_file()
    return LLM(
        str(directory),
        quantization=METHOD if quantized else None,
        dtype=dtype,
        enforce_eager=True,
        # vLLM does not start unless this share of the machine's memory is free, however little the model needs.
        gpu_memory_utilization=0.3,
        max_model_len=max_length,
        max_num_batched_tokens=max(2048, max_length),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
