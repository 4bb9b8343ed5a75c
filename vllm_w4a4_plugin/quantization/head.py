# SPDX-License-Identifier: Apache-2.0
"""The output head on CPUs in integers: a decode step reads a quarter or less of float32's bytes."""

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_w4a4_plugin.checkpoint.types import BIAS
from vllm_w4a4_plugin.ops import api, packing
from vllm_w4a4_plugin.ops.layout import INT4_TILE_ROWS, packed_int4_shape, packed_int8_shape
from vllm_w4a4_plugin.ops.orthogonal import flat_orthogonal

PACKED, SCALE, ROTATION = "head_weight_packed", "head_weight_scale", "head_rotation"
ROWS_AT_ONCE = 256 * INT4_TILE_ROWS
"""Rows that are quantized together: bounds the float32 copy of part of the weight."""

INT4_GROUP = 64
"""Input features that share a scale of an int4 head."""

CLIPS = tuple(1 - 0.05 * step for step in range(9))
"""Shares of max|w| that are tried as the largest int4 weight of a group."""


class RotatedHeadMethod(UnquantizedEmbeddingMethod):
    """Rounds the loaded float weight and multiplies it with int8 activations, both in a rotated basis.

    The columns of the weight and the token are multiplied by the same orthogonal matrix, a Kronecker product, which
    leaves the logits as they are and spreads the few large activations that a token's scale would follow.

    The float weight stays: a tied embedding looks tokens up in it, and weights can be loaded again. vLLM's own method
    keeps a second, packed copy of it too.

    Args:
        bits: 8 for one scale per token of the vocabulary, 4 for one per INT4_GROUP input features as well.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        rows, features = weight.shape
        groups = features // INT4_GROUP if self.bits == 4 and features % INT4_GROUP == 0 else 1
        if not hasattr(layer, PACKED):
            # Neither parameters nor buffers: vLLM's reload would put the former values of those back.
            shape = packed_int8_shape(rows, features) if self.bits == 8 else packed_int4_shape(rows, features)
            setattr(layer, PACKED, packing.zeros(shape, torch.int8 if self.bits == 8 else torch.uint8))
            setattr(layer, SCALE, torch.empty((rows, groups) if groups > 1 else rows, dtype=torch.float32))
            setattr(layer, ROTATION, rotation(features))
        packed, scale, factors = (getattr(layer, name) for name in (PACKED, SCALE, ROTATION))
        pack_rows_ = packing.pack_int8_rows_ if self.bits == 8 else packing.pack_int4_rows_
        round_rows = round_to_int8 if self.bits == 8 else round_to_int4
        for first in range(0, rows, ROWS_AT_ONCE):
            part = rotate(weight[first : first + ROWS_AT_ONCE].float(), *factors)
            q, step = round_rows(part.reshape(-1, features // groups))
            pack_rows_(packed, q.reshape(-1, features), first)
            scale[first : first + ROWS_AT_ONCE] = step.reshape(-1, *scale.shape[1:])

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        # vLLM's logits processor passes no bias of the head's own.
        bias = getattr(layer, BIAS, None) if bias is None else bias
        packed, scale, (left, right) = (getattr(layer, name) for name in (PACKED, SCALE, ROTATION))
        if self.bits == 8:
            return api.w8a8_linear(x.contiguous(), packed, scale, bias, left, right)
        return api.flatquant_linear(x.contiguous(), packed, scale, left, right, bias=bias, activation_bits=8)


def rotation(features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two orthogonal float32 factors, [M, M] and [N, N] with M * N == features, of nearly equal sizes."""
    left = max(size for size in range(1, features + 1) if features % size == 0 and size * size <= features)
    return flat_orthogonal(left).float(), flat_orthogonal(features // left).float()


def rotate(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """weight @ kron(left, right) for a float32 weight [rows, M * N]."""
    blocks = weight.reshape(-1, left.shape[0], right.shape[0])
    return (left.T @ (blocks @ right)).reshape(weight.shape)


def round_to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [rows, features] -> int8 of the same shape and the rows' scales, float32 [rows].

    scale = max|w| / 127, w = round_half_even(w / scale). A row of zeros has scale 0.
    """
    return _rounded(weight, weight.abs().amax(1) / 127, 127)


def round_to_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with values in [-8, 7], and the scale among max|w| / 7 times CLIPS that has the least squared error."""
    largest = weight.abs().amax(1) / 7
    best, best_scale = _rounded(weight, largest, 7)
    least = _squared_error(weight, best, best_scale)
    for clip in CLIPS[1:]:
        q, scale = _rounded(weight, largest * clip, 7)
        error = _squared_error(weight, q, scale)
        is_better = error < least
        best = torch.where(is_better[:, None], q, best)
        best_scale = torch.where(is_better, scale, best_scale)
        least = torch.where(is_better, error, least)
    return best, best_scale


def _rounded(weight: torch.Tensor, scale: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.where(scale[:, None] > 0, weight / scale[:, None], 0.0).round()
    smallest = -largest if largest == 127 else -largest - 1
    return q.clamp(smallest, largest).to(torch.int8), scale


def _squared_error(weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight - q * scale[:, None]).square().sum(1)
