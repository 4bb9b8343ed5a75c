# SPDX-License-Identifier: Apache-2.0
"""A whole quantized Qwen3 in transformers, its linears computed by the reference: the oracle of the engine tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM, SamplingParams

from tests.mixtures import ReferenceExperts
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.experts import experts_layers
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.resolve import module_type
from vllm_w4a4_plugin.ops import reference

SUFFIXES = (
    *("weight", "weight_scale", "weight_offset", "left_trans", "right_trans", "clip_ratio", "bias"),
    *("input_scale", "input_offset", "quant_bias", "deq_scale"),
)


class ReferenceLinear(torch.nn.Module):
    """One quantized linear of a checkpoint, in plain torch."""

    def __init__(self, reader: CheckpointReader, name: str, kind: QuantType) -> None:
        super().__init__()
        self.kind = kind
        self.values = {
            suffix: reader.load(f"{name}.{suffix}") for suffix in SUFFIXES if f"{name}.{suffix}" in reader.tensors
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = self.values
        if self.kind is QuantType.W8A8:
            q = (x / v["input_scale"] + v["input_offset"]).round().clamp(-128, 127)
            return ((q.double() @ v["weight"].double().T + v["quant_bias"]) * v["deq_scale"]).to(x.dtype)
        scale, bias = v["weight_scale"].squeeze(1), v.get("bias")
        if self.kind is QuantType.W8A8_DYNAMIC:
            return reference.w8a8_linear(x, v["weight"], scale, bias)
        transform = v["left_trans"], v["right_trans"], v["clip_ratio"].item()
        offset = v["weight_offset"].squeeze(1)
        return reference.flatquant_linear(x, v["weight"], scale, *transform, bias, weight_offset=offset)


def prompt_logprobs(
    directory: Path, tokens: list[int], change: Callable[[torch.nn.Module], None] | None = None
) -> torch.Tensor:
    """Log probability, float32 [len(tokens) - 1], of each token but the first given those before it.

    `change` is made to the model first.
    """
    model = reference_model(directory)
    if change is not None:
        change(model)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0]
    return logits[:-1].log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]


def reference_model(directory: Path) -> Any:
    """The whole model."""
    reader = CheckpointReader(directory)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32).eval()
    for name in experts_layers(Inventory.of(reader)):
        model.set_submodule(name, ReferenceExperts(reader, name))
    quantized = set()
    for name in reader.description.modules:
        if ".experts." in name:
            continue
        kind = module_type(reader.description, name)
        if kind is not QuantType.FLOAT:
            model.set_submodule(name, ReferenceLinear(reader, name, kind))
            quantized.add(name)
    floats = {
        name: reader.load(name).float()
        for name, kind in reader.description.tensors.items()
        if kind == "FLOAT" and ".experts." not in name and name.rpartition(".")[0] not in quantized
    }
    missing, unexpected = model.load_state_dict(floats, strict=False)
    assert not unexpected
    assert not missing
    return model


def engine_logprobs(llm: LLM, tokens: list[int], **arguments: Any) -> torch.Tensor:
    """The same from a vLLM engine; `arguments` are for `LLM.generate`."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    output = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False, **arguments)[0]
    entries = output.prompt_logprobs[1:]
    return torch.tensor([entry[token].logprob for entry, token in zip(entries, tokens[1:], strict=True)])
