# SPDX-License-Identifier: Apache-2.0
"""Blocks of a finished checkpoint, from which distillation can start."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.packed import unpack_rows
from vllm_w4a4_plugin.checkpoint.reader import TensorInfo
from vllm_w4a4_plugin.checkpoint.types import (
    CLIP_RATIO,
    INPUT_SCALE,
    LEFT_TRANS,
    PACKED_DTYPE,
    RIGHT_TRANS,
    WEIGHT,
    known_types,
)
from vllm_w4a4_plugin.checkpoint.verify import check_headers

from ..block.report import NOT_QUANTIZED, LayerReport
from ..errors import CalibrationError
from ..model.streamed import HEAD, StreamedModel


def trainable_types() -> tuple[QuantType, ...]:
    """Quant types from which distillation can start: FLOAT, and those whose layers it can train as they are stored.

    Not of W4A4_DYNAMIC, whose rotation is folded into the outer tensors too, which are taken from the float model.
    """
    return tuple(kind for kind in known_types() if kind is QuantType.FLOAT or _is_trainable(kind))


def _is_trainable(kind: QuantType) -> bool:
    spec = kind.spec
    is_dynamic = spec.is_described and spec.activation_bits < 16 and spec.tensor(INPUT_SCALE) is None
    return is_dynamic and not spec.may_be_packed and kind is not QuantType.W4A4_DYNAMIC


@dataclass(frozen=True)
class StoredBlock:
    """A block of a checkpoint.

    Attributes:
        tensors: by full name.
        types: quant type by full name, in the order of the description.
        reports: what the files say of each linear layer, of experts, and of modules that stay FLOAT.
    """

    tensors: Mapping[str, Tensor]
    types: dict[str, str]
    reports: list[LayerReport]


class StartingPoint:
    """A checkpoint made from a float model.

    Args:
        model: the float model.
        reader: of the checkpoint.

    Raises:
        CheckpointError: its headers are wrong.
        CalibrationError: it was not made from `model`, or has layers of types that cannot be distilled.
    """

    def __init__(self, model: StreamedModel, reader: CheckpointReader) -> None:
        self.model, self.reader = model, reader
        check_headers(reader)
        self._check_tensors()
        self._check_embedding()

    @property
    def head_type(self) -> QuantType:
        """Of the checkpoint's output head."""
        return QuantType(self.reader.description.tensors.get(HEAD, QuantType.FLOAT))

    def block(self, index: int) -> StoredBlock:
        """Block `index` as the checkpoint has it."""
        prefix = f"{self.model.block_name(index)}."
        types = {name: kind for name, kind in self.reader.description.tensors.items() if name.startswith(prefix)}
        tensors = {name: self._load(name) for name in types}
        linears = [name for name in self.model.linear_names() if name.startswith(prefix)]
        reports = [_report(name, tensors, types) for name in linears]
        for experts in self.model.experts[index]:
            name = self.model.stored_experts(index, experts)
            reports += _expert_reports(name, self.model.expert_names(index, experts), tensors, types)
        weights = self.model.float_weights(index)
        reports += [_float_report(module, tensors, names) for module, names in weights.items()]
        return StoredBlock(tensors, types, reports)

    def _load(self, name: str) -> Tensor:
        tensor = self.reader.load(name)
        return unpack_rows(tensor) if self.reader.tensors[name].dtype == PACKED_DTYPE else tensor

    def _shape(self, info: TensorInfo) -> tuple[int, ...]:
        rows, *rest = info.shape or (0,)
        return (2 * rows, *rest) if info.dtype == PACKED_DTYPE else info.shape

    def _check_tensors(self) -> None:
        model, reader, types = self.model, self.reader, self.reader.description.tensors
        trainable, extra = trainable_types(), set(model.mtp_names())
        for name, info in model.weights.tensors.items():
            found = reader.tensors.get(name)
            if found is None and name in extra:
                continue  # the float model's are written
            if found is None or self._shape(found) != info.shape:
                shape = "is missing" if found is None else f"has shape {list(self._shape(found))}"
                raise CalibrationError(
                    f"{reader.directory}: tensor {name} {shape}, but {model.directory} has it with shape "
                    f"{list(info.shape)}. Give the float model that the checkpoint was made from."
                )
            if types[name] not in trainable:
                raise CalibrationError(
                    f"{reader.directory}: tensor {name} has quant type {types[name]}; distillation can only start "
                    f"from {', '.join(trainable)}."
                )

    def _check_embedding(self) -> None:
        embedding = f"{self.model.embedding_name}.weight"
        if not torch.equal(self.reader.load(embedding), self.model.weights.read(embedding)):
            raise CalibrationError(
                f"{self.reader.directory}: {embedding} differs from that of {self.model.directory}. Give the float "
                "model that the checkpoint was made from."
            )


def _expert_reports(
    experts: str, names: Sequence[str], tensors: Mapping[str, Tensor], types: Mapping[str, str]
) -> list[LayerReport]:
    """Of gate, up and down of all experts of a layer, or of FLOAT experts as a whole.

    Args:
        experts: full name of their module.
        names: of their linear layers, expert by expert.
        tensors, types: of the block.
    """
    if types.get(f"{names[0]}.{WEIGHT}", QuantType.FLOAT) == QuantType.FLOAT:
        own = [tensor for name, tensor in tensors.items() if name.startswith(f"{experts}.")]
        shape = [len(names) // 3, *own[0].shape[-2:]]
        return [LayerReport(experts, QuantType.FLOAT, shape, sum(tensor.nbytes for tensor in own))]
    reports = []
    for projection in range(3):
        members = [_report(name, tensors, types) for name in names[projection::3]]
        first, leaf = members[0], names[projection].rpartition(".")[2]
        nbytes = sum(member.nbytes for member in members)
        shape = [len(members), *first.shape]
        reports.append(LayerReport(f"{experts}.*.{leaf}", first.quant_type, shape, nbytes, factors=first.factors))
    return reports


def _float_report(module: str, tensors: Mapping[str, Tensor], names: Sequence[str]) -> LayerReport:
    own = [tensors[name] for name in names if name in tensors]
    shape = list(own[0].shape) if own else []
    return LayerReport(module, QuantType.FLOAT, shape, sum(tensor.nbytes for tensor in own), note=NOT_QUANTIZED)


def _report(name: str, tensors: Mapping[str, Tensor], types: Mapping[str, str]) -> LayerReport:
    own = {full: tensor for full, tensor in tensors.items() if full.startswith(f"{name}.")}
    clip = own.get(f"{name}.{CLIP_RATIO}")
    return LayerReport(
        name,
        types[f"{name}.{WEIGHT}"],
        list(own[f"{name}.{WEIGHT}"].shape),
        sum(tensor.nbytes for tensor in own.values()),
        clip=None if clip is None else clip.item(),
        factors=[len(own[f]) for f in (f"{name}.{LEFT_TRANS}", f"{name}.{RIGHT_TRANS}") if f in own],
    )
