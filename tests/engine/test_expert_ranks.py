# SPDX-License-Identifier: Apache-2.0
"""Experts on two ranks, by tensor and by expert parallelism, compute what one rank computes."""

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.engine.expert_ranks import RANKS, Batch, outputs
from tests.loading import loaded_model
from tests.mixtures import EXPERTS, HIDDEN, KINDS, TOP_K, ReferenceExperts, write_mixture
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader

PROMPTS, LENGTH = 20, 64
needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < RANKS, reason="vLLM binds each rank to a core of its own"
)
PARALLEL = {"tensor parallel": {}, "expert parallel": {"enable_expert_parallel": True}}


@dataclass
class Text:
    """Tokens, and by how much the log probability of each was larger than that of the second best."""

    tokens: list[int]
    leads: list[float]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixture")
    write_mixture(directory)
    return directory


def batch(experts: int = EXPERTS) -> Batch:
    generator = torch.Generator().manual_seed(0)
    weights, ids = torch.rand(50, experts, generator=generator).softmax(-1).topk(TOP_K)
    ids[7] = torch.tensor([0, 1])  # both on the first rank
    return torch.randn(50, HIDDEN, generator=generator), weights, ids


@pytest.mark.parametrize("arguments", PARALLEL.values(), ids=PARALLEL)
def test_two_ranks_add_up_to_one(mixture: Path, arguments: dict[str, Any]) -> None:
    """Each token's values are quantized as on one rank: only the order of a sum of floats differs."""
    x, weights, ids = batch()
    with loaded_model(mixture, dtype="float32") as model:
        single = [
            layer.mlp.experts.routed_experts.forward_modular(x, weights, ids.int()) for layer in model.model.layers
        ]
    reader = CheckpointReader(mixture)
    for first, reversed_, again in outputs(mixture, (x, weights, ids), dtype="float32", **arguments):
        for layer, (found, one) in enumerate(zip(first, single, strict=True)):
            torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-5)
            experts = ReferenceExperts(reader, f"model.layers.{layer}.mlp.experts")
            expected = experts(x, ids, weights)
            errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert errors.median() < 1e-5, KINDS[layer]
            swapped = experts(x, EXPERTS - 1 - ids, weights)
            assert ((reversed_[layer] - swapped).norm(dim=-1) / swapped.norm(dim=-1)).median() < 1e-5
        assert all(torch.equal(found, once) for found, once in zip(again, first, strict=True))


def test_seven_experts_on_two_ranks(tmp_path: Path) -> None:
    write_mixture(tmp_path, ["W4A4_FLATQUANT_DYNAMIC"], experts=7)
    x, weights, ids = batch(7)
    expected = ReferenceExperts(CheckpointReader(tmp_path), "model.layers.0.mlp.experts")(x, ids, weights)
    for (found,), _, _ in outputs(tmp_path, (x, weights, ids), dtype="float32"):
        assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 1e-5
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.experts: expected a number of expert-parallel ranks"
    ) as error:
        outputs(tmp_path, (x, weights, ids), **PARALLEL["expert parallel"])
    assert "divides the 7 experts, found 2. Use another --tensor-parallel-size" in str(error.value)


@pytest.mark.feature("expert parallelism (`--enable-expert-parallel`)")
@needs_two_cores
@pytest.mark.engine
@pytest.mark.parametrize("arguments", PARALLEL.values(), ids=PARALLEL)
def test_texts_are_those_of_one_rank(mixture: Path, texts: list[Text], arguments: dict[str, Any]) -> None:
    """Ranks add floats in another order, so an activation on the edge between two int4 codes can fall the other way.

    That moves the log probabilities of one token in some hundreds, and now and then another token is the best one; from
    there on a text is another one. At all other tokens the ranks agree with one rank to rounding.
    """
    found = generated(mixture, tensor_parallel_size=RANKS, **arguments)
    pairs = list(zip(found, texts, strict=True))
    common = [next((i for i in range(LENGTH) if a.tokens[i] != b.tokens[i]), LENGTH) for a, b in pairs]
    changes = torch.tensor([
        abs(a.leads[i] - b.leads[i]) for (a, b), same in zip(pairs, common, strict=True) for i in range(same)
    ])  # fmt: skip
    different = [same for same in common if same < LENGTH]
    flipped = int((changes > 1e-3).sum())
    print(
        f"{PROMPTS - len(different)} of {PROMPTS} texts are equal; another code at {flipped} of {len(changes)} tokens"
    )
    assert len(different) <= PROMPTS // 10
    assert flipped <= len(changes) // 100
    assert changes.median() < 1e-5


@pytest.fixture(scope="module")
def texts(mixture: Path) -> list[Text]:
    """What one rank generates."""
    found = generated(mixture)
    assert len({tuple(text.tokens) for text in found}) == PROMPTS
    return found


def generated(directory: Path, **arguments: Any) -> list[Text]:
    llm = LLM(
        str(directory),
        quantization="ascend",
        max_model_len=2 * LENGTH,
        dtype="float32",
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        skip_tokenizer_init=True,
        **arguments,
    )
    prompts = torch.randint(256, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_tokens=LENGTH, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=2)
    try:
        results = llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    return [text_of(result.outputs[0]) for result in results]


def text_of(output: Any) -> Text:
    best = [sorted((entry.logprob for entry in entries.values()), reverse=True) for entries in output.logprobs]
    return Text(list(output.token_ids), [values[0] - values[1] for values in best])
