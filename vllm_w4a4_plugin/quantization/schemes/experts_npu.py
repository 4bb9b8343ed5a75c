# SPDX-License-Identifier: Apache-2.0
"""W4A4 experts on Ascend NPUs: the kernels of each layer, and parameters in the forms that these take."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_gather

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.experts import ExpertsPlan
from vllm_w4a4_plugin.checkpoint.types import (
    BIAS,
    CLIP_RATIO,
    LEFT_TRANS,
    RIGHT_TRANS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
)
from vllm_w4a4_plugin.ops.npu import cann, experts
from vllm_w4a4_plugin.ops.npu.experts import Groups
from vllm_w4a4_plugin.ops.npu.experts_check import select_working_experts
from vllm_w4a4_plugin.ops.npu.select import EXACT_CLAMP_CLIP, INT4_PER_WORD, Kernel
from vllm_w4a4_plugin.ops.npu.select_experts import ExpertsOnRank, Product, select_experts_kernel
from vllm_w4a4_plugin.quantization.parameters.experts import ExpertPart, SharedClipRatioParameter
from vllm_w4a4_plugin.quantization.parameters.npu_experts import (
    NpuExpertsParameter,
    NpuExpertWeightParameter,
    NpuScaleWordsParameter,
    NpuSharedTransformParameter,
    NpuZeroOffsetParameter,
)

from .base import Layer
from .clip_slots import captures_graphs, set_clip_ratio
from .experts_base import DOWN, GATE_UP, NAMES, BaseExpertsScheme, zeros
from .w4a4_npu import BROKEN_ADVICE
from .whole_tokens import MAXIMUM_BYTES, token_maximum


class NpuExpertsScheme(BaseExpertsScheme):
    """Experts of which the tokens have been sorted by expert.

    With tensor parallelism each rank has a part of the intermediate features of every expert, as vllm-ascend divides
    them. A token's input of down is quantized as a whole: for a transform the ranks gather it, otherwise they tell each
    other its largest magnitude.
    """

    def __init__(self, plan: ExpertsPlan, on_packed: Callable[[], None]) -> None:
        super().__init__(plan, on_packed)
        self.has_transform = plan.quant_type.spec.has_transform
        self.clip_slot = cann.new_clip_slot()
        self.clips_exactly = True

    def create_weights(
        self, layer: Layer, places: Mapping[int, int], dtype: torch.dtype, ranks: tuple[int, int], top_k: int
    ) -> None:
        """Choose the kernels and register the layer's parameters.

        Args:
            layer: gets them.
            places: number of each expert on this rank -> its place here.
            dtype: of activations.
            ranks: (number of tensor-parallel ranks that split each expert, which of them this is).
            top_k: experts of a token.

        Raises:
            CheckpointError: nothing computes these experts here.
        """
        self.ranks, self.rank = ranks
        self.shape = ExpertsOnRank(self.spec, self.down_spec, len(places), self.ranks)
        self._choose(dtype)
        is_split = self.ranks > 1
        self.gathers = is_split and self.has_transform
        self.shares_maximum = is_split and not self.has_transform and not envs.VLLM_W4A4_LOCAL_SCALES
        part_bytes = self.shape.intermediate * dtype.itemsize
        self.sent_bytes = top_k * (part_bytes if self.gathers else MAXIMUM_BYTES if self.shares_maximum else 0)
        self._register_matrices(layer, places, GATE_UP)
        self._register_matrices(layer, places, DOWN)
        if self.has_transform:
            self._register_transforms(layer, places, dtype)

    def process_weights_after_loading(self, layer: Layer) -> None:
        """The clip ratios are known."""
        if not self.has_transform:
            return
        clip = layer.w13_clip_ratio[0].item()
        is_captured = self.choice.quantizer is Kernel.KRONECKER and self.captures_graphs
        set_clip_ratio(self.plan.prefix, self.clip_slot, clip, is_captured)
        unfused = [layer.w2_clip_ratio.min().item()]
        if self.choice.quantizer is Kernel.UNFUSED:
            unfused.append(clip)
        self.clips_exactly = min(unfused) >= EXACT_CLAMP_CLIP

    def fill_dummy_scales(self, layer: Layer, scale: float) -> None:
        if self.choice.product is Product.GROUPED:
            word = experts.scale_words(torch.tensor([scale], dtype=torch.float32, device="cpu")).item()
            for name in NAMES.values():
                getattr(layer, f"{name}_{WEIGHT_SCALE}").data.fill_(word)

    def apply(self, layer: Layer, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        """down(silu(gate(x)) * up(x)) of each row with the weights of its expert; [rows, hidden] in x's dtype.

        Args:
            layer: with the parameters.
            x: bfloat16 or float16 [rows, hidden].
            groups: of the rows. What is beyond the last one is undefined in the result.
        """
        if x.shape[0] == 0:
            return torch.empty_like(x)
        left: Any = getattr(layer, f"w13_{LEFT_TRANS}", None)
        right: Any = getattr(layer, f"w13_{RIGHT_TRANS}", None)
        if self.choice.quantizer is Kernel.KRONECKER:
            q, scale = cann.kronecker_quant(x, left, right, self.clip_slot)
        else:
            clip = layer.w13_clip_ratio if self.has_transform else None
            q, scale = cann.unfused_quant(x, left, right, clip)
        hidden = experts.swiglu(self._multiply(layer, "w13", q, scale, groups, x.dtype))
        q, scale = self._quantize_hidden(layer, hidden, groups)
        return self._multiply(layer, "w2", q, scale, groups, x.dtype)

    @property
    def operator(self) -> str:
        return self.choice.kernel

    @property
    def remark(self) -> str:
        stop = f"clip_ratio below {EXACT_CLAMP_CLIP:.3f}: int4 values stop at -7" if not self.clips_exactly else ""
        return "; ".join(filter(None, (self.choice.reason, stop)))

    def weight_bytes(self, layer: Layer) -> int:
        weights = (getattr(layer, f"{name}_{WEIGHT}") for name in NAMES.values())
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def _choose(self, dtype: torch.dtype) -> None:
        self.choice = select_working_experts(self.shape, dtype, torch.get_default_device())
        self.captures_graphs = captures_graphs()
        problem = ""
        if self.choice.product is Product.NONE:
            is_broken = select_experts_kernel(self.shape).product is not Product.NONE
            smaller = " or use a smaller --tensor-parallel-size" if self.ranks > 1 else ""
            advice = BROKEN_ADVICE if is_broken else f"Quantize the experts with another type{smaller}."
            problem = f"{self.choice.reason}. {advice}"
        elif self.choice.product is Product.PER_EXPERT and self.captures_graphs:
            problem = (
                f"{self.choice.reason}, so each expert is multiplied by itself, for which vLLM has to wait for the "
                "device in every layer. Graphs cannot be captured of that: use --enforce-eager."
            )
        if problem:
            raise CheckpointError(f"layer {self.plan.prefix}: {problem}")

    def _multiply(
        self, layer: Layer, name: str, q: torch.Tensor, scale: torch.Tensor, groups: Groups, dtype: torch.dtype
    ) -> torch.Tensor:
        weight, weight_scale = (getattr(layer, f"{name}_{suffix}") for suffix in (WEIGHT, WEIGHT_SCALE))
        if self.choice.product is Product.GROUPED:
            return experts.grouped_linear(q, scale, weight, weight_scale, groups, dtype)
        bias = getattr(layer, f"{name}_{BIAS}", None)
        if name == "w2" and self.rank > 0:
            bias = None  # what the ranks compute is added up
        return experts.linear_per_expert(q, scale, weight, weight_scale, bias, groups, dtype)

    def _quantize_hidden(self, layer: Layer, x: torch.Tensor, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's columns of the quantized input of down, and the scales of its rows."""
        columns = experts.words(x.shape[-1])
        if self.has_transform:
            if self.gathers:
                x = tensor_model_parallel_all_gather(x)
            x = experts.transform(x, layer.w2_left_trans, layer.w2_right_trans, groups)
            x = experts.clamp_tokens(x, layer.w2_clip_ratio[:, 0], groups)
        elif self.shares_maximum:
            maximum = token_maximum(x).to(x.dtype)[:, None]
            x = torch.cat((x, maximum.expand(-1, INT4_PER_WORD)), -1)
        q, scale = cann.unfused_quant(x, None, None, None)
        if self.gathers or self.shares_maximum:
            q = q.narrow(-1, self.rank * columns if self.gathers else 0, columns).contiguous()
        return q, scale

    def _register_matrices(self, layer: Layer, places: Mapping[int, int], projections: tuple[int, ...]) -> None:
        name, is_down = NAMES[projections], projections == DOWN
        spec = self.down_spec if is_down else self.spec
        parts: dict[str, int] = {"input_parts" if is_down else "row_parts": self.ranks}
        rows = spec.output_size if is_down else self.shape.intermediate
        columns, groups = (self.shape.intermediate if is_down else spec.input_size), self.shape.groups[is_down]
        count, outputs = len(places), rows * len(projections)
        is_grouped = self.choice.product is Product.GROUPED

        def part(suffix: str) -> ExpertPart:
            return ExpertPart(self.plan, suffix, projections, places)

        packed = (columns, experts.words(outputs)) if is_grouped else (outputs, experts.words(columns))
        weight = NpuExpertWeightParameter(
            torch.zeros(count, *packed, dtype=torch.int32),
            part=part(WEIGHT),
            sizes=(rows, columns),
            is_grouped=is_grouped,
            on_packed=self.on_packed,
            **parts,
        )
        layer.register_parameter(f"{name}_{WEIGHT}", weight)
        if groups == 1:
            parts.pop("input_parts", None)  # every rank has the scales of whole rows
        scale: NpuExpertsParameter
        if is_grouped:
            shape = (count, outputs) if groups == 1 else (count, groups, outputs)
            words = torch.zeros(shape, dtype=torch.int64)
            scale = NpuScaleWordsParameter(words, part=part(WEIGHT_SCALE), sizes=(rows, groups), **parts)
        else:
            scale = NpuExpertsParameter(zeros(count, outputs), part=part(WEIGHT_SCALE), sizes=(rows, 1), **parts)
        layer.register_parameter(f"{name}_{WEIGHT_SCALE}", scale)
        if spec.has_offset:
            offsets = zeros(count, outputs, *((groups,) if groups > 1 else ()))
            offset = NpuZeroOffsetParameter(offsets, part=part(WEIGHT_OFFSET), sizes=(rows, groups), **parts)
            layer.register_parameter(f"{name}_{WEIGHT_OFFSET}", offset)
        if spec.has_bias:
            bias = NpuExpertsParameter(zeros(count, outputs), part=part(BIAS), sizes=(rows, 1), **parts)
            layer.register_parameter(f"{name}_{BIAS}", bias)

    def _register_transforms(self, layer: Layer, places: Mapping[int, int], dtype: torch.dtype) -> None:
        for suffix, size, down_size in (
            (LEFT_TRANS, self.spec.left, self.down_spec.left),
            (RIGHT_TRANS, self.spec.right, self.down_spec.right),
        ):
            shared: Any = None
            own: Any = None
            if size is not None:
                part = ExpertPart(self.plan, suffix, GATE_UP, places)
                factor = torch.zeros(size, size, dtype=dtype)
                shared = NpuSharedTransformParameter(factor, part=part, transposed=suffix == LEFT_TRANS)
            if down_size is not None:
                part = ExpertPart(self.plan, suffix, DOWN, places)
                factors = torch.zeros(len(places), down_size, down_size, dtype=dtype)
                own = NpuExpertsParameter(factors, part=part, sizes=(down_size, down_size))
            layer.register_parameter(f"w13_{suffix}", shared)
            layer.register_parameter(f"w2_{suffix}", own)
        part = ExpertPart(self.plan, CLIP_RATIO, GATE_UP, places)
        clips = torch.ones(len(part.shards), dtype=torch.float32)
        layer.register_parameter(f"w13_{CLIP_RATIO}", SharedClipRatioParameter(clips, part=part))
        part = ExpertPart(self.plan, CLIP_RATIO, DOWN, places)
        own_clips = torch.ones(len(places), 1, dtype=torch.float32)
        layer.register_parameter(f"w2_{CLIP_RATIO}", NpuExpertsParameter(own_clips, part=part, sizes=(1, 1)))
