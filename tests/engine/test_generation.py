# SPDX-License-Identifier: Apache-2.0
"""Features of vLLM's engine that change how tokens are computed, in one engine that has all of them on."""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams

from tests.conftest import MICRO
from tests.engine.adapters import SIZES, Adapter
from tests.engine.engines import engine
from tests.engine.oracle import engine_logprobs, prompt_logprobs
from tests.engine.texts import NUMBER, assert_same_texts, greedy, prompts, structured_number
from vllm_w4a4_plugin.checkpoint import CheckpointReader

pytestmark = pytest.mark.engine

TYPICAL_DIFFERENCE = 0.02
TOKENS = torch.randint(3, 500, (96,), generator=torch.Generator().manual_seed(0)).tolist()
STEP = 64
"""Tokens that the engine computes at a time: fewer than TOKENS, so their prefill is in chunks."""
RANK = 8


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engine(
        MICRO,
        max_model_len=160,
        enable_prefix_caching=True,
        block_size=32,
        max_num_batched_tokens=STEP,
        max_num_seqs=STEP,
        enable_lora=True,
        max_lora_rank=RANK,
        max_loras=2,
        enable_prompt_embeds=True,
        structured_outputs_config={"backend": "xgrammar"},
    ) as llm:
        yield llm


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().median() < TYPICAL_DIFFERENCE


@pytest.mark.feature("chunked prefill")
@pytest.mark.feature("`logprobs` and `prompt_logprobs`")
def test_log_probabilities_of_prompt_and_completion(llm: LLM) -> None:
    assert_near(engine_logprobs(llm, TOKENS), prompt_logprobs(MICRO, TOKENS))
    (completion,) = greedy(llm, [TOKENS], 16)
    found = [entries[token].logprob for entries, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert_near(torch.tensor(found), prompt_logprobs(MICRO, TOKENS + list(completion.token_ids))[-16:])


@pytest.mark.feature("prefix caching")
def test_a_cached_prefix(llm: LLM) -> None:
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=2)
    first, second = (llm.generate([{"prompt_token_ids": TOKENS}], params, use_tqdm=False)[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 64
    assert_same_texts([second.outputs[0]], [first.outputs[0]])


@pytest.mark.feature("64 requests at once")
def test_many_requests_at_once_answer_as_one_by_one(llm: LLM) -> None:
    llm.reset_prefix_cache()
    all_prompts = prompts(64)
    together = greedy(llm, all_prompts, 16)
    llm.reset_prefix_cache()
    alone = [greedy(llm, [prompt], 16)[0] for prompt in all_prompts[::3]]
    assert_same_texts(together[::3], alone)


@pytest.mark.feature("beam search")
def test_beam_search(llm: LLM) -> None:
    """The log probability of the best beam is that of its tokens, and no less than that of greedy decoding."""
    prompt, length = TOKENS[:20], 6
    beams = llm.beam_search(
        [{"prompt_token_ids": prompt}], BeamSearchParams(beam_width=3, max_tokens=length, ignore_eos=True)
    )
    best = beams[0].sequences[0]
    assert best.tokens[: len(prompt)] == prompt
    expected = prompt_logprobs(MICRO, list(best.tokens))[-length:].sum().item()
    assert best.cum_logprob == pytest.approx(expected, abs=0.1)
    (greedy_one,) = greedy(llm, [prompt], length)
    assert best.cum_logprob >= greedy_one.cumulative_logprob - 0.1


@pytest.mark.feature("prompt embeddings")
def test_a_prompt_as_embeddings(llm: LLM) -> None:
    table = CheckpointReader(MICRO).load("model.embed_tokens.weight").float()
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=2)
    output = llm.generate([{"prompt_embeds": table[TOKENS[:40]]}], params, use_tqdm=False)[0]
    assert_same_texts([output.outputs[0]], greedy(llm, [TOKENS[:40]], 16))


@pytest.mark.feature("structured output: xgrammar")
def test_structured_output(llm: LLM) -> None:
    assert re.fullmatch(NUMBER, structured_number(llm))


@pytest.mark.feature(
    "structured output: lm-format-enforcer", refused="the package does not find this version of vLLM, with any model"
)
def test_a_backend_that_does_not_know_this_vllm() -> None:
    with pytest.raises(ImportError, match="vllm is not installed"):
        import_module("lmformatenforcer.integrations.vllm")


@pytest.mark.feature("LoRA adapters")
def test_an_adapter(llm: LLM, tmp_path: Path) -> None:
    """On quantized and float layers, fused ones among them; the model by itself stays what it was."""
    names = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    adapter = Adapter(tmp_path, 1, RANK, names)
    plain, adapted = prompt_logprobs(MICRO, TOKENS), prompt_logprobs(MICRO, TOKENS, adapter.adapt)
    assert (adapted - plain).abs().median() > 5 * TYPICAL_DIFFERENCE
    assert_near(engine_logprobs(llm, TOKENS, lora_request=adapter.request), adapted)
    assert_near(engine_logprobs(llm, TOKENS), plain)


@pytest.mark.feature("several LoRA adapters at once (`--max-loras`)")
def test_adapters_beside_each_other(llm: LLM, tmp_path: Path) -> None:
    """Of other ranks and for other linears, in batches with the model itself; a third takes the place of another."""
    adapters: list[Adapter | None] = [None]
    for number, rank, names in (
        (2, RANK, ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")),
        (3, RANK // 2, ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")),
        (4, 1, tuple(SIZES)),
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        adapters.append(Adapter(directory, number, rank, names))
    prompt, length = TOKENS[:20], 32
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=0)
    for chosen in (adapters[:3], adapters[::-1]):
        requests = [adapter and adapter.request for adapter in chosen]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt}] * len(chosen), params, use_tqdm=False, lora_request=requests
        )
        for adapter, other, output in zip(chosen, chosen[1:] + chosen[:1], outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            entries = zip(output.outputs[0].logprobs, tokens, strict=True)
            found = torch.tensor([entry[token].logprob for entry, token in entries])
            expected, others = (
                prompt_logprobs(MICRO, prompt + tokens, which and which.adapt)[-length:] for which in (adapter, other)
            )
            assert_near(found, expected)
            assert (found - others).abs().median() > 5 * TYPICAL_DIFFERENCE
