# SPDX-License-Identifier: Apache-2.0
"""int4 weights that are stored two to a byte: [output_size / 2, input_size], half the size.

The byte in row i of a column holds row 2 i of the matrix in its low half and row 2 i + 1 in its high half, as two's
complement. `vllm-w4a4 convert --pack` writes this with the dtype U8, which says by itself that the weight is packed.
msModelSlim writes its W4A8 types so with the dtype I8 (its `w4a8_pack_int4`); half as many rows as scales show it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .types import PACKED_DTYPE, WEIGHT, WEIGHT_SCALE, QuantType

if TYPE_CHECKING:
    import torch

    from .reader import TensorInfo


def matrix_shape(tensors: Mapping[str, "TensorInfo"], quant_type: QuantType) -> tuple[int, ...]:
    """Shape of a module's weight matrix, [output_size, input_size] of one that is stored packed; () if it has none.

    Args:
        tensors: of the module, by suffix.
        quant_type: of the module.
    """
    if WEIGHT not in tensors:
        return ()
    shape = tensors[WEIGHT].shape
    return (2 * shape[0], *shape[1:]) if is_packed(tensors, quant_type) else shape


def is_packed(tensors: Mapping[str, "TensorInfo"], quant_type: QuantType) -> bool:
    """Whether the weight of a module holds two int4 values in each byte."""
    if WEIGHT not in tensors or len(tensors[WEIGHT].shape) != 2:
        return False
    described = quant_type.spec.tensor(WEIGHT)
    if tensors[WEIGHT].dtype == PACKED_DTYPE:
        return described is not None and PACKED_DTYPE in described.dtypes
    if not quant_type.spec.may_be_packed or WEIGHT_SCALE not in tensors:
        return False
    scale = tensors[WEIGHT_SCALE].shape
    return len(scale) > 0 and 2 * tensors[WEIGHT].shape[0] == scale[0]


def unpack_rows(packed: "torch.Tensor") -> "torch.Tensor":
    """int8 [output_size, input_size] from the packed form, uint8 or int8."""
    # Without a copy_: vLLM's reload counts what is copied to know when a layer is complete.
    rows = packed.char().repeat_interleave(2, 0)
    rows[0::2].bitwise_left_shift_(4)
    return rows >> 4


def pack_rows(codes: Any) -> Any:
    """The packed form of int8 [output_size, input_size] with int4 values and an even number of rows.

    Args:
        codes: a tensor of torch or an array of numpy.

    Returns:
        The same kind, int8.
    """
    return (codes[0::2] & 15) | (codes[1::2] << 4)
