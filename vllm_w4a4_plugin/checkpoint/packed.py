# SPDX-License-Identifier: Apache-2.0
"""int4 weights that are stored two to a byte, as msModelSlim writes W4A8_DYNAMIC.

[output_size / 2, input_size] int8: byte i of a column holds row 2 i in its low half and row 2 i + 1 in its high half
(msModelSlim's `w4a8_pack_int4`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .types import WEIGHT, WEIGHT_SCALE, QuantType

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
    """Whether the weight of a module has half as many rows as there are scales for rows."""
    if not quant_type.spec.may_be_packed or WEIGHT not in tensors or WEIGHT_SCALE not in tensors:
        return False
    weight, scale = tensors[WEIGHT].shape, tensors[WEIGHT_SCALE].shape
    return len(weight) == 2 and len(scale) > 0 and 2 * weight[0] == scale[0]


def unpack_rows(packed: "torch.Tensor") -> "torch.Tensor":
    """int8 [output_size, input_size] from the packed form."""
    # Without a copy_: vLLM's reload counts what is copied to know when a layer is complete.
    rows = packed.repeat_interleave(2, 0)
    rows[0::2].bitwise_left_shift_(4)
    return rows >> 4


def pack_rows(codes: "torch.Tensor") -> "torch.Tensor":
    """The packed form of int8 [output_size, input_size] with int4 values and an even number of rows."""
    return (codes[0::2] & 15) | (codes[1::2] << 4)
