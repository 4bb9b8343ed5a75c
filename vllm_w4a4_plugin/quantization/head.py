# SPDX-License-Identifier: Apache-2.0
"""The output head on CPUs in int8: a decode step reads a quarter of float32's bytes, or half of bfloat16's."""

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_w4a4_plugin.checkpoint.types import BIAS
from vllm_w4a4_plugin.ops import api, packing
from vllm_w4a4_plugin.ops.layout import INT4_TILE_ROWS, packed_int8_shape

PACKED, SCALE = "int8_weight", "int8_weight_scale"
ROWS_AT_ONCE = 256 * INT4_TILE_ROWS
"""Rows that are quantized together: bounds the float32 copy of part of the weight."""


class Int8HeadMethod(UnquantizedEmbeddingMethod):
    """Rounds the loaded float weight to int8, one scale per token of the vocabulary, and computes with that.

    The float weight stays: a tied embedding looks tokens up in it, and weights can be loaded again. vLLM's own method
    keeps a second, packed copy of it too.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        rows, features = weight.shape
        packed = getattr(layer, PACKED, None)
        if packed is None:
            # Neither parameters nor buffers: vLLM's reload would put the former values of those back.
            packed = torch.zeros(packed_int8_shape(rows, features), dtype=torch.int8)
            setattr(layer, PACKED, packed)
            setattr(layer, SCALE, torch.empty(rows, dtype=torch.float32))
        scale = getattr(layer, SCALE)
        for first in range(0, rows, ROWS_AT_ONCE):
            q, row_scale = quantize_rows(weight[first : first + ROWS_AT_ONCE].float())
            packing.pack_int8_rows_(packed, q, first)
            scale[first : first + ROWS_AT_ONCE] = row_scale

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        # vLLM's logits processor passes no bias of the head's own.
        bias = getattr(layer, BIAS, None) if bias is None else bias
        return api.split_linear(x.contiguous(), getattr(layer, PACKED), getattr(layer, SCALE), bias)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [rows, features] -> int8 of the same shape and the rows' scales, float32 [rows].

    scale = max|w| / 127, w = round_half_even(w / scale). A row of zeros has scale 0.
    """
    scale = weight.abs().amax(1) / 127
    q = torch.where(scale[:, None] > 0, weight / scale[:, None], 0.0)
    return q.round().clamp(-127, 127).to(torch.int8), scale
