# SPDX-License-Identifier: Apache-2.0
"""The dimensions of one linear layer, from the headers of its tensors and the table of types."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, prod
from typing import TYPE_CHECKING, NoReturn

from .description import QuantDescription
from .errors import CheckpointError
from .packed import matrix_shape
from .reader import TensorInfo
from .runnable import Kind, unsupported_reason
from .types import (
    BIAS,
    LEFT_TRANS,
    RIGHT_TRANS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_OFFSET_SECOND,
    WEIGHT_SCALE,
    WEIGHT_SCALE_SECOND,
    Layout,
    QuantType,
    TensorSpec,
    known_suffixes,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer of the checkpoint, checked.

    Attributes:
        name: module name in the checkpoint.
        quant_type: its type.
        output_size, input_size: of the weight matrix [output_size, input_size].
        groups: scales per output row; 1 means per-channel.
        left, right: sizes of the Kronecker factors, None where the factor is absent (identity).
        has_offset, has_bias: whether those tensors are stored.
        has_scale: False if layers of the type have weight scales and this one does not store its own.
        has_second_scale: whether the scales of groups are stored as factors of the scale of their row.
        has_second_offset: whether offsets of groups are stored next to them.
    """

    name: str
    quant_type: QuantType
    output_size: int
    input_size: int
    groups: int = 1
    left: int | None = None
    right: int | None = None
    has_offset: bool = False
    has_bias: bool = False
    has_second_scale: bool = False
    has_second_offset: bool = False
    has_scale: bool = True

    @property
    def leaf(self) -> str:
        """Last part of the name, e.g. `q_proj`."""
        return self.name.rpartition(".")[2]


def kronecker_sizes(n: int) -> tuple[int, int]:
    """The factor sizes (M, N), M * N == n, that msModelSlim chooses for an input size n.

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
        quant_type: a type whose tensors are described.

    Raises:
        CheckpointError: a tensor is missing or superfluous, or has a wrong dtype or shape.
    """
    return _LinearChecker(tensors, name, quant_type).spec()


def assumed_spec(
    description: QuantDescription, name: str, quant_type: QuantType, input_size: int, output_size: int
) -> LinearSpec:
    """What a layer will look like when only its description exists (planning, dummy weights).

    Presence comes from the description; factor sizes from msModelSlim's rule; a group size from its `group_size`.

    Raises:
        CheckpointError: the size of a lone transform factor cannot be known.
    """
    present = {t.suffix for t in quant_type.spec.tensors if f"{name}.{t.suffix}" in description.tensors}
    left = right = None
    if LEFT_TRANS in present and RIGHT_TRANS in present:
        left, right = kronecker_sizes(input_size)
    elif LEFT_TRANS in present or RIGHT_TRANS in present:
        raise CheckpointError(
            f"layer {name}: only one transform factor is described, so its size has to be read from the weights, "
            "and there are none. Put the *.safetensors files next to the description."
        )
    # The group size of msModelSlim's description is that of the layers without a transform.
    has_groups = quant_type.spec.has_groups and not quant_type.spec.has_transform and description.group_size
    has_second = WEIGHT_SCALE_SECOND in present
    groups = input_size // description.group_size if (has_groups or has_second) and description.group_size else 1
    return LinearSpec(
        name,
        quant_type,
        output_size,
        input_size,
        groups,
        left,
        right,
        WEIGHT_OFFSET in present,
        BIAS in present,
        has_second,
        WEIGHT_OFFSET_SECOND in present,
        quant_type.spec.tensor(WEIGHT_SCALE) is None or WEIGHT_SCALE in present,
    )


class _LinearChecker:
    """Checks one layer's headers, tensor by tensor in the order of the type's table entry."""

    def __init__(self, tensors: Mapping[str, TensorInfo], name: str, quant_type: QuantType) -> None:
        self.tensors, self.name, self.quant_type = tensors, name, quant_type
        self.module = {t.suffix: info for t in quant_type.spec.tensors if (info := tensors.get(f"{name}.{t.suffix}"))}
        self.groups = 1
        self.factors: dict[str, int | None] = {}

    def spec(self) -> LinearSpec:
        if not self.quant_type.spec.is_described:
            raise CheckpointError(unsupported_reason(self.name, self.quant_type, Kind.LINEAR))
        weight = self.required(WEIGHT)
        if len(weight.shape) != 2:
            self.fail(weight, "two dimensions [out, in]", f"shape {list(weight.shape)}")
        self.output_size, self.input_size = matrix_shape(self.module, self.quant_type)
        for suffix in known_suffixes():
            if self.quant_type.spec.tensor(suffix) is None and (info := self.stored(suffix)):
                self.fail(info, f"no such tensor in a {self.quant_type} layer", "one")
        for tensor in self.quant_type.spec.tensors:
            info = self.required(tensor.suffix) if tensor.required else self.stored(tensor.suffix)
            if info is not None:
                self.check(tensor, info)
        left, right = self.transform()
        return LinearSpec(
            self.name,
            self.quant_type,
            self.output_size,
            self.input_size,
            self.groups,
            left,
            right,
            has_offset=self.stored(WEIGHT_OFFSET) is not None,
            has_bias=self.stored(BIAS) is not None,
            has_second_scale=self.stored(WEIGHT_SCALE_SECOND) is not None,
            has_scale=self.quant_type.spec.tensor(WEIGHT_SCALE) is None or self.stored(WEIGHT_SCALE) is not None,
            has_second_offset=self.stored(WEIGHT_OFFSET_SECOND) is not None,
        )

    def check(self, tensor: TensorSpec, info: TensorInfo) -> None:
        shape, found = info.shape, str(list(info.shape))
        if info.dtype not in tensor.dtypes:
            self.fail(info, f"dtype {' or '.join(tensor.dtypes)} for {self.quant_type}", info.dtype)
        match tensor.layout:
            case Layout.SCALES:
                self.check_scales(info)
            case Layout.SECOND_SCALES:
                self.check_groups(info)
            case Layout.LIKE_SCALES | Layout.LIKE_SECOND_SCALES:
                scales = self.required(WEIGHT_SCALE if tensor.layout is Layout.LIKE_SCALES else WEIGHT_SCALE_SECOND)
                if _table(shape) != _table(scales.shape):
                    self.fail(info, f"the shape of {scales.name.rpartition('.')[2]}, {list(scales.shape)}", found)
            case Layout.SQUARE:
                if len(shape) != 2 or shape[0] != shape[1]:
                    self.fail(info, "a square float matrix", f"{info.dtype} {found}")
                self.factors[tensor.suffix] = shape[0]
            case Layout.ONE_VALUE:
                if prod(shape) != 1:
                    self.fail(info, "one value", f"shape {found}")
            case Layout.ROW:
                if shape != (self.output_size,):
                    self.fail(info, f"a float tensor of shape [{self.output_size}]", f"{info.dtype} {found}")
            case Layout.ROWS:
                if shape[:1] != (self.output_size,):
                    self.fail(info, f"{self.output_size} rows", f"shape {found}")

    def check_scales(self, info: TensorInfo) -> None:
        self.check_groups(info)
        if self.groups > 1 and not self.quant_type.spec.has_groups:
            self.fail(info, f"one scale per output row for {self.quant_type}", f"{self.groups} groups")

    def check_groups(self, info: TensorInfo) -> None:
        shape = _table(info.shape)
        if len(shape) != 2 or shape[0] != self.output_size:
            self.fail(info, f"shape [{self.output_size}, 1] or [{self.output_size}, groups]", str(list(info.shape)))
        self.groups = shape[1]
        if self.groups < 1 or self.input_size % self.groups:
            self.fail(info, f"a number of groups that divides the {self.input_size} input features", str(self.groups))

    def transform(self) -> tuple[int | None, int | None]:
        """Sizes of the two factors, None for one that is not stored."""
        left, right = self.factors.get(LEFT_TRANS), self.factors.get(RIGHT_TRANS)
        known = (1 if left is None else left) * (1 if right is None else right)
        is_whole = left is not None and right is not None
        if known == 0 or self.input_size % known or (is_whole and known != self.input_size):
            shown = " x ".join("absent" if size is None else str(size) for size in (left, right))
            raise CheckpointError(
                f"layer {self.name}: the sizes of left_trans and right_trans must multiply to the {self.input_size} "
                f"input features, found {shown}. The transforms belong to another layer or model; quantize the model "
                "again."
            )
        return left, right

    def stored(self, suffix: str) -> TensorInfo | None:
        return self.tensors.get(f"{self.name}.{suffix}")

    def required(self, suffix: str) -> TensorInfo:
        info = self.stored(suffix)
        if info is None:
            raise CheckpointError(
                f"layer {self.name}: tensor {self.name}.{suffix} is in none of the weight files, but a "
                f"{self.quant_type} layer needs it. The checkpoint is incomplete; copy or quantize it again."
            )
        return info

    def fail(self, info: TensorInfo, expected: str, found: str) -> NoReturn:
        raise CheckpointError(
            f"{info.file}: layer {self.name}, tensor {info.name}: expected {expected}, found {found}. "
            "The checkpoint is damaged or was made by an incompatible tool; quantize the model again."
        )


def _table(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[rows, groups] of scales or offsets stored as [rows], [rows, groups] or [rows, groups, 1]."""
    if len(shape) == 1:
        return (*shape, 1)
    return shape[:2] if shape[2:] == (1,) else shape


def check_values(suffix: str, tensor: "torch.Tensor", quant_type: QuantType) -> str:
    """What is wrong with the values of one tensor of a layer, "" if nothing is.

    Args:
        suffix: `weight`, `weight_scale`, ...
        tensor: the values, any shape.
        quant_type: the layer's type.
    """
    described = quant_type.spec.tensor(suffix)
    return described.check(tensor) if described is not None and described.check is not None else ""
