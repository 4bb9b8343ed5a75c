# SPDX-License-Identifier: Apache-2.0
"""The tensors that belong to no block, as the checkpoint has them: FLOAT, but for the output head where it is asked."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.types import WEIGHT, WEIGHT_OFFSET, WEIGHT_SCALE

from ..block.rounding import best_weight_scale, largest_code
from ..model.streamed import HEAD

ROWS_AT_ONCE = 4096
"""Rows of the head that are rounded together: bounds the float32 copies."""

HEAD_TYPES = (QuantType.FLOAT, QuantType.W8A8_DYNAMIC)


def outer_types(outer: Mapping[str, Tensor], head: QuantType) -> dict[str, QuantType]:
    """Quant type of every tensor that `with_head` returns, the head's last."""
    types = {name: QuantType.FLOAT for name in outer if name != HEAD}
    if HEAD not in outer:
        return types
    if not head.spec.is_quantized:
        return {**types, HEAD: head}
    return {**types, **dict.fromkeys(map(_name, (WEIGHT, WEIGHT_SCALE, WEIGHT_OFFSET)), head)}


def with_head(outer: Mapping[str, Tensor], head: QuantType) -> dict[str, Tensor]:
    """The tensors with the output head in a type of `HEAD_TYPES`.

    Args:
        outer: float tensors by name.
        head: of the output head, rounded to nearest with the scale of each row that has the least squared error.
    """
    if not head.spec.is_quantized or HEAD not in outer:
        return dict(outer)
    codes, scale = _rounded(outer[HEAD], head.spec.weight_bits)
    quantized = {WEIGHT: codes, WEIGHT_SCALE: scale, WEIGHT_OFFSET: torch.zeros_like(scale)}
    others = {name: tensor for name, tensor in outer.items() if name != HEAD}
    return {**others, **{_name(suffix): tensor for suffix, tensor in quantized.items()}}


def _name(suffix: str) -> str:
    return f"{HEAD.removesuffix(WEIGHT)}{suffix}"


def _rounded(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """int8 codes of the weight's shape, and float32 scales [rows, 1]."""
    top = largest_code(bits)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(len(weight), 1, dtype=torch.float32)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        part = weight[rows].float()
        scale[rows] = best_weight_scale(part, torch.ones(part.shape[1]), bits)
        codes[rows] = (part / scale[rows]).round_().clamp_(-top, top).to(torch.int8)
    return codes, scale
