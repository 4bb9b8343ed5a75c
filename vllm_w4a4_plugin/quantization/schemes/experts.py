# SPDX-License-Identifier: Apache-2.0
"""Quantized experts on CPUs: int4 or int8 weights, with or without transforms, as their quant type's entry says."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vllm_w4a4_plugin.checkpoint.experts import ExpertsPlan
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.checkpoint.types import (
    BIAS,
    CLIP_RATIO,
    LEFT_TRANS,
    RIGHT_TRANS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
)
from vllm_w4a4_plugin.ops import api, cpu, packing
from vllm_w4a4_plugin.ops.layout import packed_int4_shape, packed_int8_shape
from vllm_w4a4_plugin.ops.self_check import require_working_kernels
from vllm_w4a4_plugin.quantization.parameters.experts import (
    ExpertPart,
    ExpertsParameter,
    PackedExpertsParameter,
    SharedClipRatioParameter,
    SharedTransformParameter,
)

from .base import Layer
from .cpu_activations import CpuActivations
from .experts_base import DOWN, GATE_UP, NAMES, BaseExpertsScheme, zeros


class ExpertsScheme(CpuActivations, BaseExpertsScheme):
    """Whole experts, computed by one operator.

    Attributes:
        has_part_of_sum: whether the ranks add up their sums over experts themselves; set before `create_weights`.
    """

    def __init__(self, plan: ExpertsPlan, on_packed: Callable[[], None]) -> None:
        super().__init__(plan, on_packed)
        self.choose_activation_bits(plan.quant_type)
        self.is_int4 = plan.quant_type.spec.weight_bits == 4
        self.has_part_of_sum = False

    def create_weights(self, layer: Layer, places: Mapping[int, int], dtype: torch.dtype) -> None:
        """Register the layer's parameters.

        Args:
            layer: gets them.
            places: number of each expert on this rank -> its place here.
            dtype: of activations.
        """
        require_working_kernels(dtype, self.plan.quant_type.spec.weight_bits, experts=True)
        if self.has_part_of_sum:
            self.sent_bytes = torch.float64.itemsize * self.spec.input_size
        self._register_matrices(layer, places, GATE_UP, self.spec)
        self._register_matrices(layer, places, DOWN, self.down_spec)
        if not self.plan.quant_type.spec.has_transform:
            return
        for suffix, size in ((LEFT_TRANS, self.spec.left), (RIGHT_TRANS, self.spec.right)):
            part = ExpertPart(self.plan, suffix, GATE_UP, places)
            factor = None if size is None else SharedTransformParameter(zeros(size, size), part=part)
            layer.register_parameter(f"w13_{suffix}", factor)
        part = ExpertPart(self.plan, CLIP_RATIO, GATE_UP, places)
        layer.register_parameter(
            f"w13_{CLIP_RATIO}", SharedClipRatioParameter(torch.ones(len(part.shards), dtype=torch.float32), part=part)
        )
        count = len(places)
        for suffix, size in ((LEFT_TRANS, self.down_spec.left), (RIGHT_TRANS, self.down_spec.right)):
            part = ExpertPart(self.plan, suffix, DOWN, places)
            own = None if size is None else ExpertsParameter(zeros(count, size, size), part=part, sizes=(size, size))
            layer.register_parameter(f"w2_{suffix}", own)
        part = ExpertPart(self.plan, CLIP_RATIO, DOWN, places)
        clips = ExpertsParameter(torch.ones(count, 1, dtype=torch.float32), part=part, sizes=(1, 1))
        layer.register_parameter(f"w2_{CLIP_RATIO}", clips)

    def apply(
        self,
        layer: Layer,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:
        """[tokens, hidden]: the weighted sum over the experts of this rank, x [tokens, hidden].

        In x's dtype, or in float64 where the ranks have parts of the sum, which is rounded only when it is complete.

        `expert_map`: int32, the place here of each expert, -1 for those of other ranks; None if all are here.
        """
        has_clips = self.plan.quant_type.spec.has_transform and not self.is_widened
        optional: dict[str, Any] = {
            f"{name}_{key}": getattr(layer, f"{name}_{suffix}", None)
            for name in NAMES.values()
            for key, suffix in (
                ("offset", WEIGHT_OFFSET), ("bias", BIAS), (LEFT_TRANS, LEFT_TRANS), (RIGHT_TRANS, RIGHT_TRANS)
            )
        }  # fmt: skip
        return api.experts_mlp(
            x.contiguous(),
            topk_weights.float().contiguous(),
            topk_ids.contiguous(),
            layer.w13_weight,
            layer.w13_weight_scale,
            layer.w2_weight,
            layer.w2_weight_scale,
            **optional,
            # All of gate's and up's are equal.
            w13_clip_ratio=layer.w13_clip_ratio[:1] if has_clips else 1.0,
            w2_clip_ratio=layer.w2_clip_ratio if has_clips else 1.0,
            expert_map=expert_map,
            activation_bits=self.activation_bits,
            is_double=self.has_part_of_sum,
        )

    @property
    def operator(self) -> str:
        return f"vllm_w4a4::experts_mlp, {cpu.cpu_instruction_set()}"

    def weight_bytes(self, layer: Layer) -> int:
        return layer.w13_weight.numel() + layer.w2_weight.numel()

    def _register_matrices(
        self, layer: Layer, places: Mapping[int, int], projections: tuple[int, ...], spec: LinearSpec
    ) -> None:
        """Weights, scales, offsets and biases of gate and up or of down."""
        name = NAMES[projections]
        rows, columns, groups = spec.output_size, spec.input_size, spec.groups
        experts, all_rows = len(places), len(projections) * rows

        def part(suffix: str) -> ExpertPart:
            return ExpertPart(self.plan, suffix, projections, places)

        packed = (packed_int4_shape if self.is_int4 else packed_int8_shape)(all_rows, columns)
        weight = PackedExpertsParameter(
            packing.zeros(packed, torch.int8, count=experts),
            part=part(WEIGHT),
            sizes=(rows, columns),
            pack_rows=packing.pack_int4_rows_ if self.is_int4 else packing.pack_int8_rows_,
            on_packed=self.on_packed,
        )
        layer.register_parameter(f"{name}_{WEIGHT}", weight)
        for suffix in (WEIGHT_SCALE, *([WEIGHT_OFFSET] if spec.has_offset else [])):
            # int8 weights are symmetric: their offsets are checked to be zero, and not computed with.
            data = zeros(experts, all_rows, *((groups,) if groups > 1 else ()))
            layer.register_parameter(
                f"{name}_{suffix}", ExpertsParameter(data, part=part(suffix), sizes=(rows, groups))
            )
        if spec.has_bias:
            bias = ExpertsParameter(zeros(experts, all_rows), part=part(BIAS), sizes=(rows, 1))
            layer.register_parameter(f"{name}_{BIAS}", bias)
