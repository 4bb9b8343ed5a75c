# SPDX-License-Identifier: Apache-2.0
"""Greedy completions, and whether two engines or two ways of running one give the same."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

NEAR_TIE = 0.15
"""Log probabilities of a model with random weights, of which neighbours are 0.18 apart on average."""

NUMBER = r"[1-9][0-9]{4}"


def prompts(count: int, shortest: int = 4) -> list[list[int]]:
    """Random prompts of which each is one token longer than the one before."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 500, (shortest + i,), generator=generator).tolist() for i in range(count)]


def greedy(llm: LLM, tokens: Sequence[list[int]], length: int) -> list[Any]:
    """A completion of each prompt, with the log probabilities of the best two tokens at each place."""
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=2)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in tokens], params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def assert_same_texts(found: Sequence[Any], expected: Sequence[Any]) -> None:
    """The completions are the same, but for one in ten that may part where two tokens are nearly as probable.

    Sums of floats are made in another order on several ranks and in other batches, which now and then makes a rounding
    of the next layer fall the other way. After that a text goes its own way.
    """
    parted = 0
    for mine, wanted in zip(found, expected, strict=True):
        pairs = zip(mine.token_ids, wanted.token_ids, strict=True)
        different = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        if different is not None:
            best = sorted((entry.logprob for entry in wanted.logprobs[different].values()), reverse=True)
            assert best[0] - best[1] < NEAR_TIE
            parted += 1
    assert parted <= -(-len(expected) // 10)


def structured_number(llm: LLM) -> str:
    """What the model completes a prompt to if it may only write a number of five digits; at a high temperature."""
    params = SamplingParams(
        temperature=2.0, seed=3, max_tokens=32, structured_outputs=StructuredOutputsParams(regex=NUMBER)
    )
    return llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)[0].outputs[0].text
