# SPDX-License-Identifier: Apache-2.0
"""Which tensors a linear layer of each quantization type has, with which dtypes, shapes and values.

The one place for these rules: the verifier, the vLLM loader and the writer all use them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING

from .description import QuantDescription, QuantType
from .errors import CheckpointError
from .reader import TensorInfo

if TYPE_CHECKING:
    import torch

WEIGHT = "weight"
WEIGHT_SCALE = "weight_scale"
WEIGHT_OFFSET = "weight_offset"
LEFT_TRANS = "left_trans"
RIGHT_TRANS = "right_trans"
CLIP_RATIO = "clip_ratio"
BIAS = "bias"

INT4_MIN, INT4_MAX = -8, 7
FLOAT_DTYPES = ("F32", "BF16", "F16")

_TRANSFORM = (LEFT_TRANS, RIGHT_TRANS, CLIP_RATIO)
_QUANTIZED = (WEIGHT, WEIGHT_SCALE, WEIGHT_OFFSET)

TENSORS_OF: Mapping[QuantType, tuple[str, ...]] = {
    QuantType.FLOAT: (WEIGHT,),
    QuantType.W8A8_DYNAMIC: _QUANTIZED,
    QuantType.W4A4_DYNAMIC: _QUANTIZED,
    QuantType.W4A4_FLATQUANT_DYNAMIC: (*_QUANTIZED, *_TRANSFORM),
}
"""Runnable types and the tensors (besides `bias`) that a layer of the type may have."""


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer of the checkpoint, checked.

    Attributes:
        name: module name in the checkpoint.
        quant_type: its type.
        out_features, in_features: of the weight matrix.
        groups: scales per output row; 1 means per-channel.
        left, right: sizes of the Kronecker factors, None where the factor is absent (identity).
        has_offset, has_bias: whether those tensors are stored.
    """

    name: str
    quant_type: QuantType
    out_features: int
    in_features: int
    groups: int = 1
    left: int | None = None
    right: int | None = None
    has_offset: bool = False
    has_bias: bool = False


def kronecker_sizes(n: int) -> tuple[int, int]:
    """The factor sizes (M, N), M * N == n, that msModelSlim chooses for n input features.

    Fermat's method: the smallest a >= sqrt(n) for which a*a - n is a perfect square b*b gives (a - b, a + b).

    Raises:
        ValueError: n == 2 (mod 4) or n < 1 has no such pair.
    """
    if n < 1 or n % 4 == 2:
        raise ValueError(f"{n} is not a difference of two squares, so it has no pair of Kronecker factor sizes")
    a = isqrt(n - 1) + 1
    while True:
        b = isqrt(a * a - n)
        if b * b == a * a - n:
            return a - b, a + b
        a += 1


def linear_spec(tensors: Mapping[str, TensorInfo], name: str, quant_type: QuantType) -> LinearSpec:
    """Check the headers of one layer's tensors and collect its dimensions.

    Args:
        tensors: all tensors of the checkpoint, by name.
        name: the layer's name in the checkpoint.
        quant_type: a type of `TENSORS_OF`.

    Raises:
        CheckpointError: a tensor is missing or superfluous, or has a wrong dtype or shape.
    """
    return _LinearChecker(tensors, name, quant_type).spec()


def agreeing_spec(layer: str, specs: Sequence[LinearSpec]) -> LinearSpec:
    """The spec that stands for all shards of a fused layer.

    Raises:
        CheckpointError: the shards differ in something that one operator call has only one of.
    """
    first = specs[0]
    for key, what in _SHARED.items():
        values = {spec.name: getattr(spec, key) for spec in specs}
        if len(set(values.values())) > 1:
            listing = ", ".join(f"{name}: {value}" for name, value in values.items())
            raise CheckpointError(
                f"layer {layer} is computed as one matrix product, so {what} of its parts must be equal, "
                f"found {listing}. Quantize them again as one group."
            )
    return first


_SHARED = {
    "in_features": "the number of input features",
    "groups": "the number of weight scale groups",
    "left": "the size of left_trans",
    "right": "the size of right_trans",
    "has_offset": "the presence of weight_offset",
    "has_bias": "the presence of bias",
}


def assumed_spec(
    description: QuantDescription, name: str, quant_type: QuantType, in_features: int, out_features: int
) -> LinearSpec:
    """What a layer will look like when only its description exists (planning, dummy weights).

    Presence comes from the description; factor sizes from msModelSlim's rule; a group size from its `group_size`.
    """
    present = {s for s in (*TENSORS_OF[quant_type], BIAS) if f"{name}.{s}" in description.tensors}
    left = right = None
    if LEFT_TRANS in present and RIGHT_TRANS in present:
        left, right = kronecker_sizes(in_features)
    elif LEFT_TRANS in present or RIGHT_TRANS in present:
        raise CheckpointError(
            f"layer {name}: only one transform factor is described, so its size has to be read from the weights, "
            "and there are none. Put the *.safetensors files next to the description."
        )
    groups = in_features // description.group_size if description.group_size else 1
    if quant_type is not QuantType.W4A4_DYNAMIC:
        groups = 1
    has_offset, has_bias = WEIGHT_OFFSET in present, BIAS in present
    return LinearSpec(name, quant_type, out_features, in_features, groups, left, right, has_offset, has_bias)


class _LinearChecker:
    def __init__(self, tensors: Mapping[str, TensorInfo], name: str, quant_type: QuantType) -> None:
        self.tensors, self.name, self.quant_type = tensors, name, quant_type

    def spec(self) -> LinearSpec:
        if self.quant_type not in TENSORS_OF:
            raise CheckpointError(unsupported(self.name, self.quant_type))
        weight = self.need(WEIGHT, ("I8",) if self.quant_type is not QuantType.FLOAT else FLOAT_DTYPES)
        if len(weight.shape) != 2:
            self.fail(weight, "two dimensions [out, in]", f"shape {list(weight.shape)}")
        out_features, in_features = weight.shape
        allowed = TENSORS_OF[self.quant_type]
        for other in (WEIGHT_SCALE, WEIGHT_OFFSET, *_TRANSFORM):
            if other not in allowed and (info := self.get(other)):
                self.fail(info, f"no such tensor in a {self.quant_type} layer", "one")
        bias = self.get(BIAS)
        if bias and (bias.shape != (out_features,) or bias.dtype not in FLOAT_DTYPES):
            self.fail(bias, f"a float tensor of shape [{out_features}]", f"{bias.dtype} {list(bias.shape)}")
        if self.quant_type is QuantType.FLOAT:
            return LinearSpec(self.name, self.quant_type, out_features, in_features, has_bias=bias is not None)
        scale = self.need(WEIGHT_SCALE, FLOAT_DTYPES)
        groups = self.groups(scale, out_features, in_features)
        offset = self.get(WEIGHT_OFFSET)
        if offset and offset.shape != scale.shape:
            self.fail(offset, f"the shape of weight_scale, {list(scale.shape)}", str(list(offset.shape)))
        left, right = self.factors(in_features)
        return LinearSpec(
            self.name,
            self.quant_type,
            out_features,
            in_features,
            groups,
            left,
            right,
            offset is not None,
            bias is not None,
        )

    def groups(self, scale: TensorInfo, out_features: int, in_features: int) -> int:
        groups = 1 if len(scale.shape) == 1 else scale.shape[-1]
        if len(scale.shape) > 2 or scale.shape[0] != out_features:
            self.fail(scale, f"shape [{out_features}, 1] or [{out_features}, groups]", str(list(scale.shape)))
        if groups > 1 and not self.quant_type.is_w4a4:
            self.fail(scale, f"one scale per output row for {self.quant_type}", f"{groups} groups")
        if groups < 1 or in_features % groups:
            self.fail(scale, f"a number of groups that divides the {in_features} input features", str(groups))
        return groups

    def factors(self, in_features: int) -> tuple[int | None, int | None]:
        if self.quant_type is not QuantType.W4A4_FLATQUANT_DYNAMIC:
            return None, None
        clip = self.need(CLIP_RATIO, FLOAT_DTYPES)
        if clip.shape not in ((), (1,)):
            self.fail(clip, "one value", f"shape {list(clip.shape)}")
        sizes: list[int | None] = []
        for suffix in (LEFT_TRANS, RIGHT_TRANS):
            info = self.get(suffix)
            if info and (len(info.shape) != 2 or info.shape[0] != info.shape[1] or info.dtype not in FLOAT_DTYPES):
                self.fail(info, "a square float matrix", f"{info.dtype} {list(info.shape)}")
            sizes.append(info.shape[0] if info else None)
        left, right = sizes
        known = (left or 1) * (right or 1)
        exact = left is not None and right is not None
        if known == 0 or in_features % known or (exact and known != in_features):
            shown = " x ".join("absent" if size is None else str(size) for size in sizes)
            raise CheckpointError(
                f"layer {self.name}: the sizes of left_trans and right_trans must multiply to the {in_features} input "
                f"features, found {shown}. The transforms belong to another layer or model; quantize the model again."
            )
        return left, right

    def get(self, suffix: str) -> TensorInfo | None:
        return self.tensors.get(f"{self.name}.{suffix}")

    def need(self, suffix: str, dtypes: tuple[str, ...]) -> TensorInfo:
        info = self.get(suffix)
        if info is None:
            raise CheckpointError(
                f"layer {self.name}: tensor {self.name}.{suffix} is in none of the weight files, but a "
                f"{self.quant_type} layer needs it. The checkpoint is incomplete; copy or quantize it again."
            )
        if info.dtype not in dtypes:
            self.fail(info, f"dtype {' or '.join(dtypes)} for {self.quant_type}", info.dtype)
        return info

    def fail(self, info: TensorInfo, expected: str, found: str) -> None:
        raise CheckpointError(
            f"{info.file}: layer {self.name}, tensor {info.name}: expected {expected}, found {found}. "
            "The checkpoint is damaged or was made by an incompatible tool; quantize the model again."
        )


def unsupported(name: str, quant_type: QuantType) -> str:
    """Message for a layer whose type is known but cannot be run here."""
    return (
        f"layer {name}: quant type {quant_type} cannot be run here. "
        f"Types that can: {', '.join(TENSORS_OF)}. Quantize this layer with one of them."
    )


CLIP_TOLERANCE = 1e-3
"""Relative difference up to which the clip ratios of fused layers are averaged; v1 files differ by about 1e-5."""


def common_clip(clips: Mapping[str, float]) -> float:
    """The one clip ratio of layers that vLLM fuses: their mean.

    Args:
        clips: tensor name -> clip ratio.

    Raises:
        CheckpointError: they differ by more than `CLIP_TOLERANCE` relative to the largest.
    """
    low, high = min(clips.values()), max(clips.values())
    if high - low > CLIP_TOLERANCE * high:
        listing = ", ".join(f"{name}: {clip:.6f}" for name, clip in clips.items())
        raise CheckpointError(
            f"clip ratios of layers that are computed as one matrix product differ by more than {CLIP_TOLERANCE:g} "
            f"relative, found {listing}. Quantize them again as one group."
        )
    return sum(clips.values()) / len(clips)


def check_values(suffix: str, tensor: "torch.Tensor", quant_type: QuantType) -> str | None:
    """What is wrong with the values of one tensor of a layer, None if nothing is.

    Args:
        suffix: `weight`, `weight_scale`, ...
        tensor: the values, any shape.
        quant_type: the layer's type.
    """
    check = _VALUE_CHECKS.get((quant_type.is_w4a4, suffix)) or _VALUE_CHECKS.get((None, suffix))
    return check(tensor) if check else None


def _int4(weight: "torch.Tensor") -> str | None:
    low, high = (int(value) for value in weight.aminmax()) if weight.numel() else (0, 0)
    if low < INT4_MIN or high > INT4_MAX:
        return f"expected int4 values in [{INT4_MIN}, {INT4_MAX}], found values from {low} to {high}"
    return None


def _finite(tensor: "torch.Tensor") -> str | None:
    bad = (~tensor.isfinite()).sum().item()
    return f"expected finite values, found {bad} of {tensor.numel()} that are not" if bad else None


def _positive_scale(scale: "torch.Tensor") -> str | None:
    if problem := _finite(scale):
        return problem
    bad = (scale < 0).sum().item()
    return f"expected scales that are not negative, found {bad} of {scale.numel()} that are" if bad else None


def _clip(clip: "torch.Tensor") -> str | None:
    value = clip.item()
    return None if 0.0 < value <= 1.0 else f"expected a clip ratio in (0, 1], found {value}"


_VALUE_CHECKS: Mapping[tuple[bool | None, str], Callable[["torch.Tensor"], str | None]] = {
    (True, WEIGHT): _int4,
    (None, WEIGHT_SCALE): _positive_scale,
    (None, WEIGHT_OFFSET): _finite,
    (None, LEFT_TRANS): _finite,
    (None, RIGHT_TRANS): _finite,
    (None, CLIP_RATIO): _clip,
}
