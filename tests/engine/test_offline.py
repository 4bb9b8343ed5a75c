# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine on the checkpoint of the real tool: eager and compiled, and reloading weights under it.

Whole models are compared by the log probabilities of a prompt in float32. Single 4-bit roundings that fall the other
way move them a little, a wrong layer moves them by several units.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.conftest import MICRO, swapped_layers
from tests.engine.engines import engine
from tests.engine.oracle import engine_logprobs, prompt_logprobs

pytestmark = pytest.mark.engine

TOKENS = torch.randint(3, 500, (96,), generator=torch.Generator().manual_seed(0)).tolist()
TYPICAL_DIFFERENCE = 0.02
"""Bound on the median; measured 0.000 to 0.004."""


@pytest.fixture(scope="module", params=["eager", "compiled"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    # The compiled engine is started without naming the method: it must be detected.
    method: dict[str, Any] = {"quantization": "ascend"} if request.param == "eager" else {}
    compilation = {"enforce_eager": False, "compilation_config": {"mode": 3}} if request.param == "compiled" else {}
    with engine(MICRO, gpu_memory_utilization=0.3, **method, **compilation) as llm:
        yield llm


def assert_same_model(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().median() < TYPICAL_DIFFERENCE


@pytest.mark.feature("eager mode and `torch.compile`")
def test_log_probabilities(llm: LLM) -> None:
    assert_same_model(engine_logprobs(llm, TOKENS), prompt_logprobs(MICRO, TOKENS))


@pytest.mark.feature("`LLM`, offline")
@pytest.mark.feature("greedy decoding and sampling, batches of mixed lengths")
def test_batches_and_sampling(llm: LLM) -> None:
    prompts = [{"prompt_token_ids": TOKENS[:n]} for n in (1, 5, 40, 96)]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0.6, seed=1), use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8] * 4


@pytest.mark.feature("reloading weights (`reload_weights`)")
def test_reloading_weights(llm: LLM, micro_copy: Path, edit_tensors: Callable[..., None]) -> None:
    """Another checkpoint's weights, then the first one's again: each time the outputs are those of what was loaded."""
    # The other weights have offsets, which those of MICRO have not: compiled graphs must take them all the same.
    name = "model.layers.0.self_attn.q_proj.weight_offset"
    edit_tensors({**swapped_layers(), name: torch.full((256, 1), 0.5)})
    before = engine_logprobs(llm, TOKENS)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(micro_copy)})
    other = engine_logprobs(llm, TOKENS)
    assert (other - before).abs().median() > 10 * TYPICAL_DIFFERENCE
    assert_same_model(other, prompt_logprobs(micro_copy, TOKENS))
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(MICRO)})
    assert torch.equal(engine_logprobs(llm, TOKENS), before)
