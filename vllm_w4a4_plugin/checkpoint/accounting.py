# SPDX-License-Identifier: Apache-2.0
"""What every tensor of a checkpoint is for: a parameter, nothing at all, or a reason not to load the checkpoint."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_w4a4_plugin.constants import DESCRIPTION_FILE

from .description import QuantDescription
from .model_config import layer_number, text_config
from .reader import TensorInfo, is_rotary
from .types import BIAS, FLOAT_DTYPES, SCALE_BIAS, WEIGHT, QuantType, known_suffixes, known_types

if TYPE_CHECKING:
    from .inventory import Inventory

ROTARY = "rotary position tables, which vLLM computes itself"
MTP = "layers for multi-token prediction, which this model is served without"
NPU_BIAS = "biases for NPU kernels that compute with unsigned int4 weights"
METADATA_SUFFIX = "quant_type"
"""Entries `<module>.quant_type` of a description belong to a module, not to a tensor."""

ROTATIONS = {
    "heads_rotation": "a rotation of the attention heads that QuaRot computes online, before o_proj",
    "kronecker_rotation_m": "one factor of an online rotation of QuaRot",
    "kronecker_rotation_n": "one factor of an online rotation of QuaRot",
    "global_rotation": "a rotation of the whole residual stream",
    "svd_lowrank_l1": "one factor of a low-rank correction (SVD) that is added to the layer's output",
    "svd_lowrank_l2": "one factor of a low-rank correction (SVD) that is added to the layer's output",
    "mul_scale": "a scale of the layer's input features (smooth quantization) that is applied online",
}
"""Tensors that change the arithmetic of a layer and that nothing here applies: suffix -> what it is."""

CACHE_TYPES = frozenset({"C8", "KV8", "FAQuant", "FAKQuant"})
"""Types of tensors that quantize keys, values or attention, not a layer's weights."""

_WITHOUT_CACHE = "vllm-ascend runs it on NPUs; for CPUs, quantize the model without it."

_MTP_MODULE = re.compile(r"(^|\.)mtp(_layers|_block|s)?(\.|$)")


def useless_reason(name: str, config: Mapping[str, Any]) -> str:
    """What a tensor is that serving the model does without, "" if it is needed.

    Args:
        name: of the tensor, or of a module.
        config: the decoded config.json; {} if there is none.
    """
    if is_rotary(name):
        return ROTARY
    if name.rpartition(".")[2] == SCALE_BIAS:
        return NPU_BIAS
    if _MTP_MODULE.search(name) or _is_extra_layer(name, text_config(config)):
        return MTP
    return ""


def _is_extra_layer(name: str, config: Mapping[str, Any]) -> bool:
    """Whether `name` belongs to a layer that config.json counts as one for multi-token prediction."""
    layers, extra = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    number = layer_number(name)
    if number is None or not isinstance(layers, int) or not isinstance(extra, int):
        return False
    return layers <= number < layers + extra


def complete_description(
    description: QuantDescription, tensors: Mapping[str, TensorInfo]
) -> tuple[QuantDescription, list[str]]:
    """Add what may be taken for granted: tensors without an entry whose module is float are FLOAT.

    A module is float if its weight is not described as anything else, all its tensors have a float dtype and none of
    them belongs to a quantized layer only (a scale, a transform, a rotation).

    Returns:
        The description, and the names of the tensors that were added to it.
    """
    described = description.tensors
    modules: dict[str, list[TensorInfo]] = {}
    for name, info in tensors.items():
        modules.setdefault(name.rpartition(".")[0], []).append(info)
    added: dict[str, str] = {}
    for module, infos in modules.items():
        if described.get(f"{module}.{WEIGHT}", QuantType.FLOAT) == QuantType.FLOAT and all(map(_is_float, infos)):
            added |= {info.name: QuantType.FLOAT.value for info in infos if info.name not in described}
        elif f"{module}.{BIAS}" in tensors and f"{module}.{BIAS}" not in described:
            added[f"{module}.{BIAS}"] = QuantType.FLOAT.value  # biases are always float
    if not added:
        return description, []
    return description.renamed(lambda names: {**names, **added}), list(added)


def _is_float(info: TensorInfo) -> bool:
    suffix = info.name.rpartition(".")[2]
    is_plain = suffix in (WEIGHT, BIAS) or (suffix not in known_suffixes() and suffix not in ROTATIONS)
    return is_plain and info.dtype in FLOAT_DTYPES


def rotation_findings(description: QuantDescription) -> Iterator[str]:
    """Rotations that the description announces in its metadata."""
    for holder in (description.metadata, description.optional):
        quarot = (holder or {}).get("quarot")
        for name in sorted(ROTATIONS.keys() & quarot.keys()) if isinstance(quarot, dict) else ():
            yield (
                f"{DESCRIPTION_FILE}: the metadata of QuaRot name {name}: {ROTATIONS[name]}. Nothing here applies it, "
                "so the model would compute other numbers; quantize without it."
            )


def cache_findings(description: QuantDescription) -> Iterator[str]:
    """A quantized KV cache or attention, which nothing here runs."""
    for key in ("kv_quant_type", "kv_cache_type", "fa_quant_type"):
        value = getattr(description, key)
        if value not in (None, "", QuantType.FLOAT.value):
            yield (
                f"{DESCRIPTION_FILE}: {key} is {value!r}, but a quantized KV cache or attention cannot be run on CPU. "
                f"{_WITHOUT_CACHE}"
            )
    first = {kind: name for name, kind in reversed(description.tensors.items()) if kind in CACHE_TYPES}
    for kind, name in first.items():
        yield (
            f"{DESCRIPTION_FILE}: tensor {name} has quant type {kind}, of a quantized KV cache or attention, which "
            f"cannot be run on CPU. {_WITHOUT_CACHE}"
        )


def header_accounting(inventory: "Inventory", directory: Path) -> Iterator[str]:
    """Tensors that are described and not stored, or stored without a use or an entry; one text each."""
    described, stored = inventory.description.tensors, inventory.tensors
    for name in described:
        is_metadata = name.rpartition(".")[2] == METADATA_SUFFIX
        if name not in stored and not is_metadata and not inventory.is_useless(name):
            yield (
                f"{directory}: tensor {name} is described as {described[name]} but is in none of the weight "
                "files. The copy is incomplete, or description and weights come from different runs."
            )
    for name, info in stored.items():
        if inventory.is_useless(name):
            continue
        module, _, suffix = name.rpartition(".")
        if reason := _unused_reason(suffix, inventory.description.modules.get(module, "")):
            yield f"{info.file}: layer {module}, tensor {name}: {reason}."
        elif name not in described:
            yield (
                f"{info.file}: tensor {name} has no entry in {directory.name}/{DESCRIPTION_FILE}. "
                "Description and weights come from different runs; copy the whole directory again."
            )


def _unused_reason(suffix: str, written_type: str) -> str:
    """Why nothing would use a tensor of a module of this type, "" if something does.

    Tensors that belong to layers of another type are found where the layer is checked.
    """
    if suffix in ROTATIONS:
        return (
            f"{suffix} is {ROTATIONS[suffix]}. Nothing here applies it, so the layer would compute other numbers; "
            "quantize the model without it"
        )
    known = {kind.value: kind.spec for kind in known_types()}.get(written_type)
    if known is None or not known.is_described or not known.is_quantized or suffix in known_suffixes():
        return ""
    return (
        f"a {written_type} layer has no tensor {suffix}, so nothing would use it. The checkpoint was made by a tool "
        "that this version does not know"
    )
