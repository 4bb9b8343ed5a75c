# SPDX-License-Identifier: Apache-2.0
"""Experts of a checkpoint: loaded into the scheme's parameters, and by two formulas written out in float64.

`with_roundings` rounds where CANN's documents and sources say that its operators round; `formula` is the checkpoint's
(docs/formats.md) and rounds nothing but the int4 codes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.checkpoint.experts import plan_experts
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.runnable import ON_NPU
from vllm_w4a4_plugin.quantization.schemes.experts_npu import NpuExpertsScheme

PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
BF16 = torch.bfloat16


@dataclass
class Experts:
    """The experts of one layer of a checkpoint.

    Attributes:
        reader, prefix: where they are.
        codes: int4 codes of activations that `with_roundings` computed, by (what, expert, row); `formula` uses them
            if `use_codes`.
    """

    reader: CheckpointReader
    prefix: str
    codes: dict[Any, Tensor] = field(default_factory=dict)
    use_codes: bool = False

    def tensor(self, expert: int, leaf: str, suffix: str) -> Tensor | None:
        name = f"{self.prefix}.{expert}.{leaf}.{suffix}"
        return self.reader.load(name).double() if name in self.reader.tensors else None

    def with_roundings(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """bfloat16 [tokens, hidden] for bfloat16 x, as the operators compute; weights bfloat16."""
        y = torch.zeros(x.shape, dtype=torch.float64)
        for token, choice in _choices(ids):
            expert = int(ids[token, choice])
            q, scale = self._rounded_codes(x[token], expert, "gate_proj")
            halves = [self._rounded_product(q, scale, expert, leaf) for leaf in ("gate_proj", "up_proj")]
            hidden = (torch.nn.functional.silu(halves[0].double()) * halves[1].double()).to(BF16)
            down_q, down_scale = self._rounded_codes(hidden, expert, "down_proj")
            self.codes[token, choice] = (q, down_q)
            result = self._rounded_product(down_q, down_scale, expert, "down_proj")
            y[token] += result.double() * weights[token, choice].double()
        return y.to(BF16)

    def formula(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """float64 [tokens, hidden]."""
        y = torch.zeros(x.shape, dtype=torch.float64)
        self.compared: list[Tensor] = []
        for token, choice in _choices(ids):
            expert = int(ids[token, choice])
            q, down_q = self.codes.get((token, choice), (None, None))
            gate, up = (self._linear(x[token].double(), expert, leaf, q) for leaf in ("gate_proj", "up_proj"))
            hidden = torch.nn.functional.silu(gate) * up
            y[token] += self._linear(hidden, expert, "down_proj", down_q) * weights[token, choice].double()
        return y

    def _linear(self, x: Tensor, expert: int, leaf: str, codes: Tensor | None) -> Tensor:
        left, right, clip = (self.tensor(expert, leaf, s) for s in ("left_trans", "right_trans", "clip_ratio"))
        if left is not None:
            x = x @ torch.kron(left, right)
        scale = x.abs().max() * (1.0 if clip is None else float(clip)) / 7
        q = (x / scale).round().clamp(-8, 7)
        if codes is not None:
            self.compared.append(torch.stack((q, codes)))
        weight, weight_scale = (self.tensor(expert, leaf, s) for s in ("weight", "weight_scale"))
        groups = weight_scale.shape[1]
        matrix = weight * weight_scale.repeat_interleave(weight.shape[1] // groups, 1)
        return matrix @ (codes if self.use_codes else q) * scale

    def _rounded_codes(self, x: Tensor, expert: int, leaf: str) -> tuple[Tensor, Tensor]:
        left, right, clip = (self.tensor(expert, leaf, s) for s in ("left_trans", "right_trans", "clip_ratio"))
        if left is None:
            return _dynamic_quant(x)
        left, right = left.to(BF16).double(), right.to(BF16).double()
        first = (x.double().reshape(left.shape[0], right.shape[0]) @ right).to(BF16)
        if leaf == "down_proj":  # by grouped products, clamped, then quantized without a clip ratio
            z = (left.T @ first.double()).to(BF16).flatten()
            bound = z.abs().max() * clip.to(BF16)
            return _dynamic_quant(torch.minimum(torch.maximum(z, -bound), bound))
        z = (left.T @ first.double()).to(torch.float16).flatten().float()
        largest = z.abs().max()
        factor = (7 / float(clip.float())) / largest
        q = (z * factor).to(torch.float16).double().round().clamp(-8, 7)
        return q, largest * clip.float() / 7

    def _rounded_product(self, q: Tensor, scale: Tensor, expert: int, leaf: str) -> Tensor:
        weight, weight_scale = (self.tensor(expert, leaf, s) for s in ("weight", "weight_scale"))
        weight_scale = _nineteen_bits(weight_scale)
        groups = weight_scale.shape[1]
        sums = torch.einsum("ogk,gk->og", weight.reshape(len(weight), groups, -1), q.reshape(groups, -1))
        halves = (sums * weight_scale).to(torch.float16).float()
        total = torch.zeros(len(weight))
        for group in range(groups):
            total = total + halves[:, group]
        return (total * scale.float()).to(BF16)


def load(
    directory: Path, prefix: str, here: Iterable[int], ranks: tuple[int, int] = (1, 0), dtype: torch.dtype = BF16
) -> tuple[NpuExpertsScheme, Any]:
    """The scheme and the parameters of the experts `here`, loaded as vLLM's models load them."""
    reader = CheckpointReader(directory)
    scheme = NpuExpertsScheme(plan_experts(prefix, Inventory.of(reader), backends=ON_NPU), lambda: None)
    layer = torch.nn.Module()
    places = {expert: place for place, expert in enumerate(here)}
    scheme.create_weights(layer, places, dtype, ranks, 2)
    fill(layer, reader, prefix, scheme.plan.count)
    scheme.process_weights_after_loading(layer)
    return scheme, layer


def fill(layer: Any, reader: CheckpointReader, prefix: str, count: int) -> None:
    """Call the loaders of a layer's parameters with all tensors of its experts."""
    for expert in range(count):
        for shard, leaf in PROJECTIONS.items():
            start = f"{prefix}.{expert}.{leaf}."
            for name in (name for name in reader.tensors if name.startswith(start)):
                parameter = getattr(layer, f"{'w2' if shard == 'w2' else 'w13'}_{name.removeprefix(start)}")
                parameter.weight_loader(parameter, reader.load(name), name, shard_id=shard, expert_id=expert)


def routed(tokens: int, hidden: int, experts: int, top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 tokens, int32 numbers and bfloat16 weights of their experts."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(BF16)
    weights, ids = torch.rand(tokens, experts, generator=generator).softmax(-1).topk(top_k)
    return x, ids.to(torch.int32), (weights / weights.sum(-1, keepdim=True)).to(BF16)


def dispatcher(dispatch: Callable[..., Any], combine: Callable[..., Any]) -> Any:
    """What `_EXTRA_CTX.moe_comm_method` is to the experts."""
    return SimpleNamespace(token_dispatcher=SimpleNamespace(token_dispatch=dispatch, token_combine=combine))


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def _choices(ids: Tensor) -> Iterable[tuple[int, int]]:
    return [
        (token, choice) for token in range(ids.shape[0]) for choice in range(ids.shape[1]) if ids[token, choice] >= 0
    ]


def _dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().max() / 7
    return (x.float() / scale).double().round().clamp(-8, 7), scale


def _nineteen_bits(scale: Tensor) -> Tensor:
    """The nearest number with 10 bits after the first one, ties to even."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)
