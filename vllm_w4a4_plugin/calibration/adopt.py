# SPDX-License-Identifier: Apache-2.0
"""Blocks of a finished checkpoint, to go on from: distillation needs no more than the float model beside them."""

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.verify import check_headers

from .block import LayerReport
from .errors import CalibrationError
from .model import StreamedModel

_TRAINABLE = (QuantType.FLOAT, QuantType.W8A8_DYNAMIC, QuantType.W4A4_FLATQUANT_DYNAMIC)
"""`W4A4_DYNAMIC` is not among them: its rotation is folded into the outer tensors too, which come from the model."""


def check_origin(model: StreamedModel, reader: CheckpointReader) -> None:
    """Refuse a checkpoint that was not made from `model`, or that has layers of other types than are made here.

    Raises:
        CheckpointError: its headers are wrong. CalibrationError: anything else.
    """
    check_headers(reader)
    types = reader.description.tensors
    for name, info in model.tensors.items():
        found = reader.tensors.get(name)
        if found is None or found.shape != info.shape:
            shape = "is missing" if found is None else f"has shape {list(found.shape)}"
            raise CalibrationError(
                f"{reader.directory}: tensor {name} {shape}, but {model.directory} has it with shape "
                f"{list(info.shape)}. Give the float model that the checkpoint was made from."
            )
        if types[name] not in _TRAINABLE:
            raise CalibrationError(
                f"{reader.directory}: tensor {name} has quant type {types[name]}; only {', '.join(_TRAINABLE)} can be "
                "started from."
            )
    embedding = f"{model.embedding_name}.weight"
    if not torch.equal(reader.load(embedding), model.stored(embedding)):
        raise CalibrationError(
            f"{reader.directory}: {embedding} differs from that of {model.directory}. Give the float model that the "
            "checkpoint was made from."
        )


def adopt_block(
    model: StreamedModel, reader: CheckpointReader, index: int
) -> tuple[dict[str, Tensor], dict[str, str], list[LayerReport]]:
    """Tensors and quant types of a block, in the description's order, and what its files say of each linear layer."""
    prefix = f"{model.block_name(index)}."
    types = {name: kind for name, kind in reader.description.tensors.items() if name.startswith(prefix)}
    tensors = {name: reader.load(name) for name in types}
    linears = [name for name in model.linear_names() if name.startswith(prefix)]
    return tensors, types, [_report(name, tensors, types) for name in linears]


def _report(name: str, tensors: dict[str, Tensor], types: dict[str, str]) -> LayerReport:
    own = {full: tensor for full, tensor in tensors.items() if full.startswith(f"{name}.")}
    clip = own.get(f"{name}.clip_ratio")
    return LayerReport(
        name,
        types[f"{name}.weight"],
        list(own[f"{name}.weight"].shape),
        sum(tensor.nbytes for tensor in own.values()),
        clip=None if clip is None else clip.item(),
        factors=[len(own[f]) for f in (f"{name}.left_trans", f"{name}.right_trans") if f in own],
    )
