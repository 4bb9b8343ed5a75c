# SPDX-License-Identifier: Apache-2.0
"""W4A4 layers on Ascend NPUs: the kernel of each layer, and parameters in the form that this kernel takes."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

from vllm_w4a4_plugin.checkpoint import CheckpointError, QuantType
from vllm_w4a4_plugin.checkpoint.plan import LayerPlan
from vllm_w4a4_plugin.checkpoint.types import CLIP_RATIO, LEFT_TRANS, NPU, RIGHT_TRANS
from vllm_w4a4_plugin.ops.npu import cann, fused
from vllm_w4a4_plugin.ops.npu.select import EXACT_CLAMP_CLIP, INT4_PER_WORD, Kernel, RankShape, select_kernel
from vllm_w4a4_plugin.ops.npu.self_check import select_working_kernel
from vllm_w4a4_plugin.quantization.parameters.base import ZeroOffsetParameter
from vllm_w4a4_plugin.quantization.parameters.npu import NpuInt4Parameter, NpuTransformParameter
from vllm_w4a4_plugin.quantization.parameters.shared import ClipRatioParameter

from . import compiled_graphs
from .base import Layer, LayerShape, LinearScheme
from .clip_slots import captures_graphs, set_clip_ratio
from .registry import register_scheme
from .whole_tokens import MAXIMUM_BYTES, shares_maximum, token_maximum

BROKEN_ADVICE = (
    "Run `vllm-w4a4 doctor --device-check` to find out why. VLLM_W4A4_SELF_CHECK=0 skips the self check, "
    "VLLM_W4A4_DISABLE=1 the plugin."
)


@register_scheme(QuantType.W4A4_FLATQUANT_DYNAMIC, QuantType.W4A4_DYNAMIC, backend=NPU)
class W4A4NpuScheme(LinearScheme):
    """int4 weights x int4 activations, by the fused library if it is loaded and supports the layer, else by CANN.

    Parameters are loaded straight into the forms that the operators take, so they can be loaded again. In a
    row-parallel layer with a transform, each rank gathers the whole token, quantizes it and multiplies its own part of
    it, as on CPUs. In one without, npu_dynamic_quant finds the largest magnitude of the whole token, which the ranks
    have told each other, in columns that are appended to the rank's part.
    """

    def __init__(self, plan: LayerPlan, on_packed: Callable[[], None]) -> None:
        super().__init__(plan, on_packed)
        self.has_transform = plan.quant_type.spec.has_transform
        self.clip_slot = cann.new_clip_slot()

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        rank_shape = RankShape.of(self.spec, *shape.sizes)
        has_library = not fused.unavailable_reason()
        choice = select_working_kernel(
            rank_shape,
            shape.params_dtype,
            self.spec.has_bias,
            torch.get_default_device(),
            has_fused_library=has_library,
        )
        self.kernel, self.reason = choice.kernel, choice.reason
        if self.kernel is Kernel.NONE:
            if select_kernel(rank_shape, has_fused_library=has_library).kernel is not Kernel.NONE:
                raise CheckpointError(f"layer {self.plan.prefix}: {self.reason}. {BROKEN_ADVICE}")
            raise CheckpointError(
                f"layer {self.plan.prefix}: {self.reason}. Quantize this layer with another type"
                f"{' or use a smaller --tensor-parallel-size' if shape.is_row_parallel else ''}."
            )
        compiled_graphs.kernels[self.plan.prefix] = self.kernel
        self.gathers = shape.is_row_parallel and self.has_transform
        self.shares_maximum = shares_maximum(shape) and not self.has_transform
        self.sent_bytes = MAXIMUM_BYTES if self.shares_maximum else shape.part_bytes if self.gathers else 0
        if (self.gathers or self.shares_maximum) and layer.tp_size != get_tensor_model_parallel_world_size():
            raise CheckpointError(
                f"layer {self.plan.prefix} is split over a group of {layer.tp_size} ranks that is not the "
                "tensor-parallel group, over which its activations have to be gathered. Turn off vllm-ascend's "
                "finegrained tensor parallelism for it."
            )
        self._register_weight(layer, shape, weight_loader, NpuInt4Parameter, is_fused=self.kernel is Kernel.FUSED)
        self._register_scales(layer, shape, weight_loader, ZeroOffsetParameter)
        if self.has_transform:
            self._register_transform(layer, shape.params_dtype, weight_loader)
        self.captures_graphs = captures_graphs()

    def process_weights_after_loading(self, layer: Layer) -> None:
        self._set_clip_ratio(layer.clip_ratio[0].item() if self.has_transform else 1.0)
        if self.kernel is Kernel.FUSED:
            fused.arrange_weight_(layer.weight.as_rows())

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        left: Any = None
        right: Any = None
        clip: Any = None
        if self.has_transform:
            left, right, clip = layer.left_trans, layer.right_trans, layer.clip_ratio
        if self.kernel is Kernel.FUSED:
            return fused.flatquant_linear(x, layer.weight, layer.weight_scale, left, right, self.clip_slot, bias)
        columns = x.shape[-1] // INT4_PER_WORD
        dtype = x.dtype
        if self.gathers:
            x = tensor_model_parallel_all_gather(x)
        if self.shares_maximum:
            maximum = token_maximum(x).to(dtype)[..., None]
            x = torch.cat((x, maximum.expand(*x.shape[:-1], INT4_PER_WORD)), -1)
        if self.kernel is Kernel.KRONECKER:
            q, scale = cann.kronecker_quant(x, left, right, self.clip_slot)
        else:
            q, scale = cann.unfused_quant(x, left, right, clip)
        if self.gathers:
            q = q.narrow(-1, layer.tp_rank * columns, columns).contiguous()
        if self.shares_maximum:
            q = q.narrow(-1, 0, columns).contiguous()
        return cann.int4_linear(q, scale, layer.weight, layer.weight_scale, bias, dtype)

    @property
    def keeps_input_parts(self) -> bool:
        return True

    @property
    def operator(self) -> str:
        return self.kernel

    @property
    def remark(self) -> str:
        if not self.reason:
            return ""
        stop = f"; clip_ratio below {EXACT_CLAMP_CLIP:.3f}: int4 values stop at -7" if self.stops_early else ""
        return f"{self.plan.prefix.rpartition('.')[2]}: {self.reason}{stop}"

    def weight_bytes(self, layer: Layer) -> int:
        return layer.weight.numel() * layer.weight.element_size()

    def _register_transform(self, layer: Layer, dtype: torch.dtype, weight_loader: Callable[..., Any]) -> None:
        for suffix, size in ((LEFT_TRANS, self.spec.left), (RIGHT_TRANS, self.spec.right)):
            factor = None
            if size is not None:
                factor = NpuTransformParameter(
                    torch.zeros(size, size, dtype=dtype),
                    transposed=suffix == LEFT_TRANS and self.kernel is not Kernel.FUSED,
                    plan=self.plan,
                    suffix=suffix,
                    weight_loader=weight_loader,
                )
            layer.register_parameter(suffix, factor)
        clips = torch.ones(len(self.plan.shards), dtype=torch.float32)
        clip = ClipRatioParameter(clips, plan=self.plan, suffix=CLIP_RATIO, weight_loader=weight_loader)
        layer.register_parameter(CLIP_RATIO, clip)

    def _set_clip_ratio(self, value: float) -> None:
        is_captured = self.kernel in (Kernel.KRONECKER, Kernel.FUSED) and self.captures_graphs
        set_clip_ratio(self.plan.prefix, self.clip_slot, value, is_captured)
        self.stops_early = self.kernel is Kernel.UNFUSED and value < EXACT_CLAMP_CLIP
