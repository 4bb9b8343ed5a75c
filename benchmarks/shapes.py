# SPDX-License-Identifier: Apache-2.0
"""The linear layers of one decoder block of each model, as vLLM fuses them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    name: str
    input_size: int
    output_size: int

    def __str__(self) -> str:
        return f"{self.name} {self.input_size}x{self.output_size}"


@dataclass(frozen=True)
class Model:
    """Sizes from the model's config.json."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 151936

    @property
    def linears(self) -> list[Linear]:
        attention = self.heads * self.head_dim
        return [
            Linear("qkv", self.hidden, attention + 2 * self.kv_heads * self.head_dim),
            Linear("o", attention, self.hidden),
            Linear("gate_up", self.hidden, 2 * self.intermediate),
            Linear("down", self.intermediate, self.hidden),
        ]


MODELS = [
    Model("SmolLM2-135M", hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocabulary=49152),
    Model("Qwen3-0.6B", hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128),
    Model("Qwen3-8B", hidden=4096, intermediate=12288, heads=32, kv_heads=8, head_dim=128),
    Model("Qwen3-32B", hidden=5120, intermediate=25600, heads=64, kv_heads=8, head_dim=128),
]
