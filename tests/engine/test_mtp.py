# SPDX-License-Identifier: Apache-2.0
"""Layers that predict a further token (MTP), quantized like the model that they belong to."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import SamplingParams

from tests.cases import write_case
from tests.conftest import DESCRIPTION
from tests.engine.engines import engine
from tests.engine.oracle import ReferenceLinear, prompt_logprobs, reference_model
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType

pytestmark = pytest.mark.engine

HEAD = "model.mtp_layers.0"
LIKELY = 6
"""Tokens that are ever likely, so that a layer of random weights guesses some of the model's right."""
PROMPT, LENGTH = list(range(3, 43)), 64


def write(directory: Path, describes_head: bool) -> Path:
    """A small MiMo whose output head knows LIKELY tokens. The case's own description has no entries of the layer."""
    write_case("d1_mimo_undesc", directory)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"][:-LIKELY] = 0
    tensors["lm_head.weight"][-LIKELY:] *= 4
    save_file(tensors, file, {"format": "pt"})
    if describes_head:
        entries = json.loads((directory / DESCRIPTION).read_text())
        for name in (name for name in tensors if name.startswith(HEAD)):
            module, _, suffix = name.rpartition(".")
            entries[name] = "FLOAT" if suffix == "bias" else kind_of(module, tensors).value
        (directory / DESCRIPTION).write_text(json.dumps(entries))
    return directory


def kind_of(module: str, tensors: Collection[str]) -> QuantType:
    if f"{module}.left_trans" in tensors:
        return QuantType.W4A4_FLATQUANT_DYNAMIC
    return QuantType.W8A8_DYNAMIC if f"{module}.weight_scale" in tensors else QuantType.FLOAT


def proposals(directory: Path, tokens: list[int]) -> torch.Tensor:
    """The layer's proposal for the token after the next one of each place but the last, in transformers and float32.

    As MiMo's own code has it: the model's hidden state before its last norm and the embedding of the next token, which
    counts as zero at the first place, go through a norm each, a projection, and a layer of the model's kind.
    """
    reader = CheckpointReader(directory)
    model = reference_model(directory)
    hidden: list[torch.Tensor] = []
    model.model.norm.register_forward_hook(lambda _, inputs, y: hidden.append(inputs[0]))
    config = AutoConfig.from_pretrained(directory)
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    layer = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().model
    values = {name.removeprefix(f"{HEAD}."): reader.load(name) for name in reader.tensors if name.startswith(HEAD)}
    linears = (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))
    for name in linears:
        kind = kind_of(name, values)
        if kind is QuantType.FLOAT:
            layer.layers[0].get_submodule(name).weight.data = values[f"{name}.weight"].float()
        else:
            layer.layers[0].set_submodule(name, ReferenceLinear(reader, f"{HEAD}.{name}", kind))
    for name in ("input_layernorm", "post_attention_layernorm"):
        layer.layers[0].get_submodule(name).weight.data = values[f"{name}.weight"].float()
    layer.norm.weight.data = values["final_layernorm.weight"].float()

    def normed(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], values[f"{name}.weight"].float(), config.rms_norm_eps)

    with torch.inference_mode():
        model(torch.tensor([tokens]))
        following = model.model.embed_tokens(torch.tensor([tokens[1:]])).clone()
        following[:, 0] = 0
        both = [normed("hidden_layernorm", hidden[0][:, :-1]), normed("token_layernorm", following)]
        states = layer(inputs_embeds=torch.cat(both, -1) @ values["input_proj.weight"].float().T).last_hidden_state
        return model.lm_head(states)[0].argmax(-1)


@pytest.mark.feature("speculative decoding: MTP layers", flag="W4A4_FAMILIES")
@pytest.mark.skipif(os.environ.get("W4A4_FAMILIES") != "1", reason="an engine more: W4A4_FAMILIES=1 runs it")
def test_proposals_are_those_of_the_layer(tmp_path: Path) -> None:
    """The tokens are the model's own. It accepts the proposals that the layer's formula gets right."""
    plain, directory = write(tmp_path / "plain", False), write(tmp_path / "described", True)
    head = {"method": "mtp", "num_speculative_tokens": 1}
    options = {"skip_tokenizer_init": True, "speculative_config": head, "disable_log_stats": False}
    with engine(directory, quantization="ascend", **options) as llm:

        def completion(prompt: list[int], length: int) -> Any:
            params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=0, detokenize=False)
            return llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]

        def accepted() -> int:
            (count,) = (m for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
            return int(count.value)

        whole = completion(PROMPT, LENGTH)
        text = PROMPT + list(whole.token_ids)
        found = []
        for end in range(len(PROMPT), len(text) - 1):
            before = accepted()
            completion(text[:end], 2)  # a token, and a proposal for the next
            found.append(accepted() > before)
    entries = zip(whole.logprobs, whole.token_ids, strict=True)
    logprobs = torch.tensor([entry[token].logprob for entry, token in entries])
    assert (logprobs - prompt_logprobs(plain, text)[-LENGTH:]).abs().median() < 0.02
    guesses = proposals(plain, text).tolist()
    expected = [guesses[end - 1] == text[end + 1] for end in range(len(PROMPT), len(text) - 1)]
    assert 8 <= sum(expected) <= LENGTH - 8
    wrong = sum(a != b for a, b in zip(found, expected, strict=True))
    assert wrong <= 2  # where a rounding falls the other way
