# SPDX-License-Identifier: Apache-2.0
"""Features of vLLM's engine that change how tokens are computed, in one engine that has all of them on."""

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams

from tests.conftest import MICRO
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
ADAPTED = {
    "self_attn.q_proj": (192, 256),
    "self_attn.v_proj": (192, 128),
    "self_attn.o_proj": (256, 192),
    "mlp.up_proj": (192, 384),
    "mlp.down_proj": (384, 192),
}


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
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(2):
        for name, (inputs, outputs) in ADAPTED.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) * 0.05
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) * 0.05
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    modules = [name.rpartition(".")[2] for name in ADAPTED]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": modules, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    def adapt(model: torch.nn.Module) -> None:
        for layer in range(2):
            for name in ADAPTED:
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                a, b = (tensors[f"{prefix}.lora_{part}.weight"] for part in "AB")
                module = model.get_submodule(f"model.layers.{layer}.{name}")
                module.register_forward_hook(lambda _, inputs, y, a=a, b=b: y + 2 * (inputs[0] @ a.T @ b.T))

    request = LoRARequest("adapter", 1, str(tmp_path))
    plain, adapted = prompt_logprobs(MICRO, TOKENS), prompt_logprobs(MICRO, TOKENS, adapt)
    assert (adapted - plain).abs().median() > 5 * TYPICAL_DIFFERENCE
    assert_near(engine_logprobs(llm, TOKENS, lora_request=request), adapted)
    assert_near(engine_logprobs(llm, TOKENS), plain)
