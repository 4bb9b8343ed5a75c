# SPDX-License-Identifier: Apache-2.0
"""Features of vLLM that need an engine of their own: pipelines and draft models."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from tests.conftest import DESCRIPTION, INDEX, MICRO, WEIGHTS
from tests.engine.engines import engine
from tests.engine.oracle import engine_logprobs, prompt_logprobs
from tests.engine.packed_cases import write_packed
from tests.engine.texts import NUMBER, greedy, structured_number
from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.constants import METHOD
from vllm_w4a4_plugin.quantization.loading.rotation import is_rotated

pytestmark = pytest.mark.engine

TOKENS = torch.randint(3, 500, (96,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.feature("structured output: outlines")
@pytest.mark.feature("pipeline parallelism (`--pipeline-parallel-size`), eager")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to a core of its own")
def test_pipeline() -> None:
    """In eager mode, where vLLM by itself does not allocate what the second stage receives into."""
    with engine(
        MICRO, quantization=METHOD, pipeline_parallel_size=2, structured_outputs_config={"backend": "outlines"}
    ) as llm:
        number = structured_number(llm)
        difference = engine_logprobs(llm, TOKENS) - prompt_logprobs(MICRO, TOKENS)
    assert difference.abs().median() < 0.02
    assert re.fullmatch(NUMBER, number)


@pytest.mark.feature("speculative decoding: draft model")
def test_draft_model(tmp_path: Path) -> None:
    """The draft is the model itself in another form, which its own files tell: all that it proposes is accepted."""
    write_packed(MICRO, tmp_path / "packed")
    draft = {"model": str(tmp_path / "packed"), "method": "draft_model", "num_speculative_tokens": 3}
    with engine(MICRO, quantization=METHOD, speculative_config=draft, disable_log_stats=False) as llm:
        llm.generate([{"prompt_token_ids": TOKENS}], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    proposed = counts["vllm:spec_decode_num_draft_tokens"]
    assert proposed >= 9
    assert counts["vllm:spec_decode_num_accepted_tokens"] == proposed


@pytest.mark.feature("speculative decoding: draft model", flag="W4A4_FAMILIES")
@pytest.mark.skipif(os.environ.get("W4A4_FAMILIES") != "1", reason="an engine more: W4A4_FAMILIES=1 runs it")
def test_draft_model_of_a_float_target(tmp_path: Path) -> None:
    """The draft is the target with its activations rounded too: much of what it proposes is accepted."""
    write_float(tmp_path)
    draft = {"model": str(MICRO), "method": "draft_model", "num_speculative_tokens": 2}
    with engine(tmp_path, speculative_config=draft, disable_log_stats=False) as llm:
        (completion,) = greedy(llm, [TOKENS[:40]], 64)
        counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    text = TOKENS[:40] + list(completion.token_ids)
    with torch.inference_mode():
        logits = model(torch.tensor([text])).logits[0, 39:-1]
    found = [entries[token].logprob for entries, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    expected = logits.log_softmax(-1)[torch.arange(64), text[40:]]
    assert (torch.tensor(found) - expected).abs().max() < 1e-2
    proposed = counts["vllm:spec_decode_num_draft_tokens"]
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0.2 * proposed > 0


def write_float(directory: Path) -> None:
    """The micro checkpoint as a float model, with what its weights stand for."""
    shutil.copytree(MICRO, directory, dirs_exist_ok=True)
    for name in (DESCRIPTION, INDEX, WEIGHTS):
        (directory / name).unlink()
    config = json.loads((MICRO / "config.json").read_text())
    del config["quantize"]
    (directory / "config.json").write_text(json.dumps(config))
    reader = CheckpointReader(MICRO)
    tensors = {}
    for name, kind in reader.description.modules.items():
        weight = reader.load(f"{name}.weight").float()
        if kind != "FLOAT":
            weight = weight * reader.load(f"{name}.weight_scale").float()
        if kind == "W4A4_FLATQUANT_DYNAMIC":
            factors = (reader.load(f"{name}.{side}_trans").float() for side in ("left", "right"))
            weight = weight @ torch.kron(*factors).T
        tensors[f"{name}.weight"] = weight
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def write_eagle_head(directory: Path) -> None:
    """A float Eagle-3 head with random weights for the micro checkpoint."""
    config = json.loads((MICRO / "config.json").read_text())
    del config["quantize"]
    config |= {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1}
    config |= {"draft_vocab_size": config["vocab_size"], "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]}}
    (directory / "config.json").write_text(json.dumps(config))
    hidden, attention, keys, inner = 192, 256, 128, 384
    shapes = {
        "fc": (hidden, 2 * hidden),
        "lm_head": (512, hidden),
        "midlayer.self_attn.q_proj": (attention, 2 * hidden),
        **{f"midlayer.self_attn.{name}_proj": (keys, 2 * hidden) for name in "kv"},
        "midlayer.self_attn.o_proj": (hidden, attention),
        **{f"midlayer.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
        "midlayer.mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    norms = ("norm", *(f"midlayer.{n}" for n in ("hidden_norm", "input_layernorm", "post_attention_layernorm")))
    save_file(tensors | {f"{name}.weight": torch.ones(hidden) for name in norms}, directory / "model.safetensors")


@pytest.mark.feature("speculative decoding: Eagle-3 head in float")
def test_eagle_head(
    micro_copy: Path,
    edit_tensors: Callable[..., None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Proposals of a random head change nothing in the tokens of the target, which a warning says is rotated."""
    reader = CheckpointReader(MICRO)
    assert not is_rotated(reader)
    norms = [name for name in reader.tensors if name.endswith("layernorm.weight")]
    edit_tensors({name: torch.ones_like(reader.load(name)) for name in norms})
    write_eagle_head(tmp_path)
    head = {"model": str(tmp_path), "method": "eagle3", "num_speculative_tokens": 3}
    with engine(micro_copy, quantization=METHOD, speculative_config=head, disable_log_stats=False) as llm:
        (completion,) = greedy(llm, [TOKENS[:40]], 32)
        counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    assert counts["vllm:spec_decode_num_draft_tokens"] > 0
    found = [entries[token].logprob for entries, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    expected = prompt_logprobs(micro_copy, TOKENS[:40] + list(completion.token_ids))[-32:]
    assert (torch.tensor(found) - expected).abs().median() < 0.02
    assert all(e[t].rank == 1 for e, t in zip(completion.logprobs, completion.token_ids, strict=True))
    # vLLM's log goes to the stream that was standard output when it was set up, which another test's may have been.
    written = capfd.readouterr()
    assert f"{micro_copy}: the residual stream of this model is rotated" in written.out + written.err + caplog.text


@pytest.mark.feature("structured output: guidance")
@pytest.mark.feature("speculative decoding: n-gram")
def test_ngram() -> None:
    """Tokens are those without speculation, and some proposals are accepted: the prompt repeats itself."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    repeating = [TOKENS[:12] * 4, TOKENS[:6] * 8]
    with engine(
        MICRO,
        quantization=METHOD,
        speculative_config=ngram,
        structured_outputs_config={"backend": "guidance"},
        disable_log_stats=False,
    ) as llm:
        found = greedy(llm, repeating, 48)
        number = structured_number(llm)
        counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    assert re.fullmatch(NUMBER, number)
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0
    for prompt, completion in zip(repeating, found, strict=True):
        logprobs = [e[t].logprob for e, t in zip(completion.logprobs, completion.token_ids, strict=True)]
        expected = prompt_logprobs(MICRO, prompt + list(completion.token_ids))[-48:]
        assert (torch.tensor(logprobs) - expected).abs().median() < 0.02
        assert all(entry[t].rank == 1 for entry, t in zip(completion.logprobs, completion.token_ids, strict=True))
