# SPDX-License-Identifier: Apache-2.0
"""The quant types: one table entry says everything about a type that does not need a kernel.

`type_table` has the entries of the types that come with the package. A new type is an entry made with `register_type`,
and a scheme with `@register_scheme` (`quantization.schemes`).
Reader, verifier, loader, writer, simulation, `inspect` and `doctor` iterate over the entry; none of them names a type.
"""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from .values import ValueCheck, finite, scales

if TYPE_CHECKING:
    from typing import Self

WEIGHT = "weight"
WEIGHT_SCALE = "weight_scale"
WEIGHT_OFFSET = "weight_offset"
LEFT_TRANS = "left_trans"
RIGHT_TRANS = "right_trans"
CLIP_RATIO = "clip_ratio"
BIAS = "bias"
WEIGHT_SCALE_SECOND = "weight_scale_second"
WEIGHT_OFFSET_SECOND = "weight_offset_second"
SCALE_BIAS = "scale_bias"
INPUT_SCALE = "input_scale"
INPUT_OFFSET = "input_offset"
QUANT_BIAS = "quant_bias"
DEQ_SCALE = "deq_scale"

FLOAT_DTYPES = ("F32", "BF16", "F16", "F64")
PACKED_DTYPE = "U8"
"""Of int4 weights that are stored two to a byte (see `packed`)."""
INT4_DTYPES = ("I8", PACKED_DTYPE)

CPU, NPU, VLLM_ASCEND = "cpu", "npu", "vllm-ascend"
"""Where a type runs: our kernels on CPUs, ours on NPUs, or vllm-ascend's own."""


class Layout(Enum):
    """What the shape of a tensor is made of, in vLLM's words for the sizes of a linear layer."""

    MATRIX = "two dimensions [output_size, input_size]"
    SCALES = "[output_size], [output_size, groups] or [output_size, groups, 1]; one group for a type without groups"
    LIKE_SCALES = "as many values as weight_scale, in one of the shapes of SCALES"
    SECOND_SCALES = "[output_size, groups], factors of weight_scale"
    LIKE_SECOND_SCALES = "as many values as weight_scale_second"
    SQUARE = "a square matrix, one factor of the Kronecker transform"
    ONE_VALUE = "one value"
    ROW = "[output_size]"
    ROWS = "[output_size] or [output_size, any size]"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a linear layer.

    Attributes:
        suffix: the last part of its name.
        layout: of its shape.
        dtypes: allowed ones, as safetensors spells them.
        required: whether a layer of the type is incomplete without it.
        check: says what is wrong with its values, None if nothing can be.
        is_shared: whether all parts of a fused layer must bring the same values.
    """

    suffix: str
    layout: Layout
    dtypes: tuple[str, ...] = FLOAT_DTYPES
    required: bool = True
    check: ValueCheck | None = None
    is_shared: bool = False


@dataclass(frozen=True)
class TypeSpec:
    """Everything that does not need a kernel about one quant type.

    Attributes:
        name: as the description spells it.
        weight_bits, activation_bits: operand widths of the product; 16 stands for the model's own float dtype.
        tensors: of a linear layer, in the order in which they are checked and stored; empty for a type that is known
            by name only.
        runs_on: of CPU, NPU and VLLM_ASCEND.
        experts_run_on: the same for the experts of a mixture.
        has_groups: whether a row may have several weight scales, one for each group of inputs.
        head_runs_on_cpu: whether CPUs run an output head of the type too. vllm-ascend runs one as a linear layer.
        may_be_packed: whether int4 weights may be stored two to a byte under the dtype I8 too, as msModelSlim does for
            some types (see `packed`).
    """

    name: str
    weight_bits: int
    activation_bits: int
    tensors: tuple[TensorSpec, ...] = ()
    runs_on: frozenset[str] = frozenset()
    experts_run_on: frozenset[str] = frozenset()
    has_groups: bool = False
    may_be_packed: bool = False
    head_runs_on_cpu: bool = False

    @property
    def has_transform(self) -> bool:
        """Whether activations pass a Kronecker transform before they are quantized."""
        return self.tensor(LEFT_TRANS) is not None

    @property
    def is_quantized(self) -> bool:
        """Whether weights are integers with scales, not the model's floats."""
        return self.weight_bits < 16

    @property
    def is_described(self) -> bool:
        """Whether the tensors of a layer are known, so that it can be checked, counted and simulated."""
        return bool(self.tensors)

    def tensor(self, suffix: str) -> TensorSpec | None:
        """The tensor with this suffix, None if layers of the type have none."""
        return next((tensor for tensor in self.tensors if tensor.suffix == suffix), None)


class QuantType(str):
    """Name of a quant type that this package knows. `QuantType("W8A8_DYNAMIC").spec` is its table entry.

    There is one object for each type, so `is` compares types.
    """

    __slots__ = ()

    FLOAT: ClassVar["QuantType"]
    W8A8: ClassVar["QuantType"]
    W8A8_FLATQUANT_DYNAMIC: ClassVar["QuantType"]
    W4A8_DYNAMIC: ClassVar["QuantType"]
    W4A8_FLATQUANT_DYNAMIC: ClassVar["QuantType"]
    W8A16: ClassVar["QuantType"]
    W4A16: ClassVar["QuantType"]
    W8A8_DYNAMIC: ClassVar["QuantType"]
    W4A4_DYNAMIC: ClassVar["QuantType"]
    W4A4_FLATQUANT_DYNAMIC: ClassVar["QuantType"]

    def __new__(cls, name: str) -> "Self":
        """The type called `name`.

        Raises:
            ValueError: no such type was registered.
        """
        if name not in _MEMBERS:
            raise ValueError(f"{name!r} is not a quant type known here")
        return _MEMBERS[name]  # type: ignore[return-value]

    @property
    def value(self) -> str:
        """The name as a plain string."""
        return str(self)

    @property
    def spec(self) -> TypeSpec:
        """The table entry."""
        return _SPECS[self]

    @property
    def is_w4a4(self) -> bool:
        """Whether the product is int4 x int4."""
        return self.spec.is_described and self.spec.weight_bits == self.spec.activation_bits == 4


_MEMBERS: dict[str, QuantType] = {}
_SPECS: dict[str, TypeSpec] = {}


def register_type(spec: TypeSpec) -> QuantType:
    """Add a type to the table, in this process. Registering an equal entry again changes nothing.

    Raises:
        ValueError: another entry has its name.
    """
    if _SPECS.get(spec.name, spec) != spec:
        raise ValueError(f"quant type {spec.name} is registered already, with another entry")
    if spec.name not in _MEMBERS:
        _MEMBERS[spec.name] = str.__new__(QuantType, spec.name)
        _SPECS[spec.name] = spec
    return _MEMBERS[spec.name]


def known_types() -> tuple[QuantType, ...]:
    """All types of the table."""
    return tuple(_MEMBERS.values())


def runnable_types(backend: str = CPU) -> tuple[QuantType, ...]:
    """Types whose linear layers run on a backend."""
    return tuple(kind for kind in known_types() if backend in kind.spec.runs_on)


def known_suffixes() -> tuple[str, ...]:
    """Suffixes of the tensors of all types, bias included, each once."""
    return tuple(dict.fromkeys(tensor.suffix for kind in known_types() for tensor in kind.spec.tensors))


BIAS_TENSOR = TensorSpec(BIAS, Layout.ROW, required=False, check=finite)
"""A layer of any type may have a bias, in float."""


def quantized_tensors(
    check: ValueCheck | None = None, offsets: ValueCheck = finite, dtypes: tuple[str, ...] = ("I8",)
) -> tuple[TensorSpec, ...]:
    """Integer weights with a float scale, and perhaps an offset, for each row or group.

    Args:
        check: of the weights' values.
        offsets: of the offsets' values.
        dtypes: of the weights.
    """
    return (
        TensorSpec(WEIGHT, Layout.MATRIX, dtypes, check=check),
        TensorSpec(WEIGHT_SCALE, Layout.SCALES, check=scales),
        TensorSpec(WEIGHT_OFFSET, Layout.LIKE_SCALES, (*FLOAT_DTYPES, "I8"), required=False, check=offsets),
    )
