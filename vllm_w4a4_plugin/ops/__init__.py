# SPDX-License-Identifier: Apache-2.0
"""The W4A4 operators: one contract each (`api`), a reference implementation, and a kernel per device.

Names are imported when they are first used, so that `ops.npu.select`, which is pure logic, does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import reference
    from .api import (
        experts_mlp,
        flatquant_linear,
        int4_linear,
        int8_linear,
        kronecker_quant,
        w8a8_linear,
        weight_only_linear,
    )
    from .cpu import cpu_available_instruction_sets, cpu_instruction_set, load_library
    from .layout import INT4_GROUP_MULTIPLE, INT4_TILE_ROWS, packed_int4_shape, packed_int8_shape
    from .packing import pack_int4, pack_int4_rows_, pack_int8_rows_, unpack_int4

__all__ = [
    "INT4_GROUP_MULTIPLE",
    "INT4_TILE_ROWS",
    "cpu_available_instruction_sets",
    "cpu_instruction_set",
    "experts_mlp",
    "flatquant_linear",
    "int4_linear",
    "int8_linear",
    "kronecker_quant",
    "load_library",
    "pack_int4",
    "pack_int4_rows_",
    "pack_int8_rows_",
    "packed_int4_shape",
    "packed_int8_shape",
    "reference",
    "unpack_int4",
    "w8a8_linear",
    "weight_only_linear",
]

_MODULES = ("layout", "api", "packing", "cpu", "reference")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    modules = (import_module(f".{module}", __name__) for module in _MODULES)
    value = next(getattr(module, name) for module in modules if hasattr(module, name))
    globals()[name] = value
    return value
