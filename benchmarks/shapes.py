# SPDX-License-Identifier: Apache-2.0
"""The linear layers of one decoder block of each model, as vLLM fuses them, and the experts of a mixture."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    name: str
    input_size: int
    output_size: int

    def __str__(self) -> str:
        return f"{self.name} {self.input_size}x{self.output_size}"


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer; sizes from the model's config.json."""

    name: str
    count: int
    top_k: int
    hidden: int
    intermediate: int

    def __str__(self) -> str:
        return f"{self.count} experts {self.hidden}x{self.intermediate}, top {self.top_k}"

    @property
    def values(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    def routing(self, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Experts chosen at random, each equally often: float32 weights, which sum to 1, and int32 ids
        [tokens, top_k]."""
        scores, ids = torch.randn(tokens, self.count, generator=generator).topk(self.top_k)
        return scores.softmax(-1), ids.int()


@dataclass(frozen=True)
class Model:
    """Sizes from the model's config.json; `intermediate` is that of one expert if there are experts."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 151936
    experts: Experts | None = None
    """In place of the MLP of every layer."""

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


EXPERTS = [Experts("Qwen3-30B-A3B", count=128, top_k=8, hidden=2048, intermediate=768)]
