# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen3-MoE with random weights, written as msModelSlim writes one, and its experts by the formula."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tests.conftest import DESCRIPTION
from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.ops import reference

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 192, 96, 8, 2
PER_GROUP = "W4A4_DYNAMIC per group"
KINDS = ("W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC", "W8A8_DYNAMIC", PER_GROUP)


def write_mixture(
    directory: Path, kinds: Sequence[str] = KINDS, experts: int = EXPERTS, top_k: int = TOP_K
) -> dict[str, torch.Tensor]:
    """Write a checkpoint with a layer of experts for each kind, everything else FLOAT; returns its tensors."""
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=len(kinds),
        num_attention_heads=4, num_key_value_heads=2, head_dim=48, max_position_embeddings=512,
        moe_intermediate_size=INTERMEDIATE, num_experts=experts, num_experts_per_tok=top_k, norm_topk_prob=True,
        tie_word_embeddings=False, architectures=["Qwen3MoeForCausalLM"], dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    types: dict[str, str] = {}
    for name, value in model.state_dict().items():
        if ".experts." not in name:
            # Weights of a size that makes the layers' outputs matter.
            tensors[name] = (value * (1 if "norm" in name else 4)).contiguous()
            types[name] = "FLOAT"
    for layer, kind in enumerate(kinds):
        transform = _transform(generator, HIDDEN) if "FLATQUANT" in kind else {}
        for expert in range(experts):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                shape = (HIDDEN, INTERMEDIATE) if leaf == "down_proj" else (INTERMEDIATE, HIDDEN)
                linear = _linear(generator, shape, kind)
                if "FLATQUANT" in kind:
                    linear |= _transform(generator, INTERMEDIATE) if leaf == "down_proj" else transform
                for suffix, value in linear.items():
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.{suffix}"
                    tensors[name], types[name] = value.clone(), kind.split()[0]
    write(directory, tensors, types)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    return tensors


def write(directory: Path, tensors: dict[str, torch.Tensor], types: dict[str, str]) -> None:
    """Weights, index and description."""
    directory.mkdir(parents=True, exist_ok=True)
    file = "quant_model_weights-00001-of-00001.safetensors"
    save_file(tensors, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (directory / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
    (directory / DESCRIPTION).write_text(json.dumps({"version": "1.0.0", "group_size": 0, **types}))


def _linear(generator: torch.Generator, shape: tuple[int, int], kind: str) -> dict[str, torch.Tensor]:
    largest = 127 if kind.startswith("W8") else 7
    groups = 3 if kind == PER_GROUP else 1
    weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5 * 2
    grouped = weight.reshape(shape[0], groups, -1)
    scale = grouped.abs().amax(-1) / largest
    q = (grouped / scale[..., None]).round().clamp(-largest - 1, largest).to(torch.int8).reshape(shape)
    return {"weight": q, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}


def _transform(generator: torch.Generator, size: int) -> dict[str, torch.Tensor]:
    left, right = {HIDDEN: (12, 16), INTERMEDIATE: (8, 12)}[size]
    return {
        "left_trans": torch.linalg.qr(torch.randn(left, left, generator=generator))[0].contiguous(),
        "right_trans": torch.linalg.qr(torch.randn(right, right, generator=generator))[0].contiguous(),
        "clip_ratio": torch.tensor([0.9]) + 0.05 * torch.rand(1, generator=generator),
    }


class ReferenceExperts(torch.nn.Module):
    """The experts of one layer of a checkpoint in plain torch, called as transformers calls its own."""

    def __init__(self, reader: CheckpointReader, prefix: str) -> None:
        super().__init__()
        self.reader, self.prefix = reader, prefix

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        def gate_up(tokens: torch.Tensor, expert: int) -> torch.Tensor:
            return torch.cat([self._linear(tokens, expert, leaf) for leaf in ("gate_proj", "up_proj")], -1)

        return reference.experts_mlp(x, weights, ids, gate_up, lambda t, e: self._linear(t, e, "down_proj"))

    def _linear(self, x: torch.Tensor, expert: int, leaf: str) -> torch.Tensor:
        name = f"{self.prefix}.{expert}.{leaf}"
        kind = self.reader.description.modules[name]
        suffixes = ("weight", "weight_scale", "weight_offset", "left_trans", "right_trans", "clip_ratio")
        v = {s: self.reader.load(f"{name}.{s}") for s in suffixes if f"{name}.{s}" in self.reader.tensors}
        if kind == "FLOAT":
            return torch.nn.functional.linear(x, v["weight"].float())
        scale, offset = (v[s].reshape(len(v["weight"]), -1) for s in ("weight_scale", "weight_offset"))
        if kind == "W8A8_DYNAMIC":
            return reference.w8a8_linear(x, v["weight"], scale.squeeze(1))
        clip = v["clip_ratio"].item() if "clip_ratio" in v else 1.0
        factors = v.get("left_trans"), v.get("right_trans")
        return reference.flatquant_linear(x, v["weight"], scale, *factors, clip, weight_offset=offset)
