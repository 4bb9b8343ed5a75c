# SPDX-License-Identifier: Apache-2.0
"""Experts on two ranks, by tensor and by expert parallelism, compute what one rank computes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.engine.engines import engine
from tests.engine.expert_ranks import RANKS, Batch, outputs
from tests.loading import loaded_model
from tests.mixtures import EXPERTS, HIDDEN, KINDS, TOP_K, ReferenceExperts, write_mixture
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader

PROMPTS, LENGTH = 20, 64
needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < RANKS, reason="vLLM binds each rank to a core of its own"
)
PARALLEL = {"tensor parallel": {}, "expert parallel": {"enable_expert_parallel": True}}


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
    """To the bit."""
    x, weights, ids = batch()
    with loaded_model(mixture, dtype="float32") as model:
        single = [
            layer.mlp.experts.routed_experts.forward_modular(x, weights, ids.int()) for layer in model.model.layers
        ]
    reader = CheckpointReader(mixture)
    for first, reversed_, again in outputs(mixture, (x, weights, ids), dtype="float32", **arguments):
        for layer, (found, one) in enumerate(zip(first, single, strict=True)):
            assert torch.equal(found, one)
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
def test_texts_are_those_of_one_rank(mixture: Path, texts: list[list[int]], arguments: dict[str, Any]) -> None:
    """Sums over experts are rounded only when they are complete, and sums over ranks add zeros."""
    assert generated(mixture, tensor_parallel_size=RANKS, **arguments) == texts


@pytest.fixture(scope="module")
def texts(mixture: Path) -> list[list[int]]:
    """What one rank generates."""
    found = generated(mixture)
    assert len({tuple(text) for text in found}) == PROMPTS
    return found


def generated(directory: Path, **arguments: Any) -> list[list[int]]:
    prompts = torch.randint(256, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_tokens=LENGTH, temperature=0.0, ignore_eos=True, detokenize=False)
    with engine(directory, quantization="ascend", skip_tokenizer_init=True, **arguments) as llm:
        results = llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]
