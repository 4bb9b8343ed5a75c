# SPDX-License-Identifier: Apache-2.0
"""W4A8 layers in the form in which msModelSlim stores them: two int4 values to a byte, and `scale_bias`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.packed import pack_rows
from vllm_w4a4_plugin.checkpoint.types import SCALE_BIAS, WEIGHT, WEIGHT_OFFSET, WEIGHT_SCALE

from ..block.rounding import dequantize
from ..files import save_tensors

ROW_PARALLEL = ("o_proj", "down_proj")
INPUT_PARTS = 16
"""Parts of the input features for which msModelSlim stores a bias each in row-parallel layers, for as many ranks."""


def pack_parts(parts: Sequence[Path], types: Mapping[str, QuantType]) -> tuple[list[Path], dict[str, QuantType]]:
    """Write packed versions of the parts that have W4A8 layers.

    Args:
        parts: safetensors files with unpacked weights.
        types: quant type of every tensor.

    Returns:
        The parts to use instead, in the same order, and the types with those of the tensors that were added.
    """
    modules = [name.removesuffix(f".{WEIGHT}") for name, kind in types.items() if _is_packed(name, kind)]
    if not modules:
        return list(parts), dict(types)
    return [_packed_part(part, modules) for part in parts], _with_biases(types, set(modules))


def scale_bias(weight: Tensor, name: str) -> Tensor:
    """8 times the sums of the rows of a dequantized weight (msModelSlim's `process_scale`).

    Args:
        weight: float [output_size, input_size].
        name: of the layer; row-parallel ones have the sums over each of 16 parts of a row.

    Returns:
        float32 [output_size, 1 or 16].
    """
    is_divided = name.endswith(ROW_PARALLEL) and weight.shape[1] % INPUT_PARTS == 0
    return 8 * weight.float().reshape(len(weight), INPUT_PARTS if is_divided else 1, -1).sum(2)


def _is_packed(name: str, kind: QuantType) -> bool:
    return name.endswith(f".{WEIGHT}") and kind.spec.tensor(SCALE_BIAS) is not None


def _packed_part(part: Path, modules: Sequence[str]) -> Path:
    tensors = load_file(part)
    present = [module for module in modules if f"{module}.{WEIGHT}" in tensors]
    if not present:
        return part
    for module in present:
        codes = tensors[f"{module}.{WEIGHT}"]
        weight = dequantize(codes.float(), tensors[f"{module}.{WEIGHT_SCALE}"], tensors[f"{module}.{WEIGHT_OFFSET}"])
        tensors[f"{module}.{SCALE_BIAS}"] = scale_bias(weight, module)
        tensors[f"{module}.{WEIGHT}"] = pack_rows(codes) if len(codes) % 2 == 0 else codes
    target = part.with_name(f"{part.stem}-packed{part.suffix}")
    save_tensors(tensors, target)
    return target


def _with_biases(types: Mapping[str, QuantType], modules: set[str]) -> dict[str, QuantType]:
    result = {}
    for name, kind in types.items():
        result[name] = kind
        module, _, suffix = name.rpartition(".")
        if suffix == WEIGHT_OFFSET and module in modules:
            result[f"{module}.{SCALE_BIAS}"] = kind
    return result
