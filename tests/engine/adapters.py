# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters with random weights for the micro checkpoint, and the same change to a transformers model."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

LAYERS = 2
SIZES = {
    "self_attn.q_proj": (192, 256),
    "self_attn.k_proj": (192, 128),
    "self_attn.v_proj": (192, 128),
    "self_attn.o_proj": (256, 192),
    "mlp.gate_proj": (192, 384),
    "mlp.up_proj": (192, 384),
    "mlp.down_proj": (384, 192),
}
"""Input and output features of the linears of a layer."""
SCALING = 2


class Adapter:
    """An adapter as PEFT stores it.

    Args:
        directory: an empty one.
        number: of the adapter among those of an engine, from 1; the seed of its weights.
        rank: of every pair of matrices.
        names: of the linears that it changes, from SIZES, in every layer.
    """

    def __init__(self, directory: Path, number: int, rank: int, names: Sequence[str]) -> None:
        self.request = LoRARequest(f"adapter-{number}", number, str(directory))
        generator = torch.Generator().manual_seed(number)
        self.pairs = {
            f"model.layers.{layer}.{name}": (
                torch.randn(rank, SIZES[name][0], generator=generator) * 0.08,
                torch.randn(SIZES[name][1], rank, generator=generator) * 0.08,
            )
            for layer in range(LAYERS)
            for name in names
        }
        tensors = {
            f"base_model.model.{name}.lora_{part}.weight": tensor
            for name, pair in self.pairs.items()
            for part, tensor in zip("AB", pair, strict=True)
        }
        save_file(tensors, directory / "adapter_model.safetensors")
        modules = [name.rpartition(".")[2] for name in names]
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": SCALING * rank,
            "target_modules": modules,
            "bias": "none",
        }
        (directory / "adapter_config.json").write_text(json.dumps(config))

    def adapt(self, model: torch.nn.Module) -> None:
        """Add to the linears of a transformers model what the adapter adds."""
        for name, (a, b) in self.pairs.items():
            model.get_submodule(name).register_forward_hook(
                lambda _, inputs, y, a=a, b=b: y + SCALING * (inputs[0] @ a.T @ b.T)
            )
