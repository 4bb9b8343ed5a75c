# SPDX-License-Identifier: Apache-2.0
"""Logits and perplexity of a finished checkpoint, computed in plain torch from the stored codes, block by block.

Independent of vLLM and of the plugin's kernels, so that what is served can be compared with what was calibrated.
"""

from collections.abc import Iterator, Mapping
from math import exp
from pathlib import Path

import torch
from torch import Tensor, nn

from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.packed import is_packed, unpack_rows
from vllm_w4a4_plugin.checkpoint.resolve import module_type
from vllm_w4a4_plugin.checkpoint.runnable import Kind, kind_of
from vllm_w4a4_plugin.checkpoint.types import (
    CLIP_RATIO,
    INPUT_SCALE,
    LEFT_TRANS,
    RIGHT_TRANS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    WEIGHT_SCALE_SECOND,
)

from .block.rounding import dequantize, quantize_tokens
from .errors import CalibrationError
from .model.streamed import HEAD, StreamedModel
from .transforms.kronecker import apply_kronecker


def float_logits(model: StreamedModel, ids: Tensor) -> Iterator[Tensor]:
    """Logits [length, vocabulary] of the float model for each row of token ids [rows, length]."""
    yield from _logits(model, ids, None)


def quantized_logits(model: StreamedModel, checkpoint: Path, ids: Tensor) -> Iterator[Tensor]:
    """Logits [length, vocabulary] of a checkpoint made from `model`, for each row of token ids [rows, length]."""
    yield from _logits(model, ids, CheckpointReader(checkpoint))


def perplexity(logits: Iterator[Tensor], ids: Tensor) -> float:
    """exp of the mean next-token loss; the first token of a row is not predicted."""
    total, count = 0.0, 0
    for row, row_logits in zip(ids, logits, strict=True):
        total += nn.functional.cross_entropy(row_logits[:-1], row[1:].to(row_logits.device), reduction="sum").item()
        count += len(row) - 1
    return exp(total / count)


@torch.no_grad()
def _logits(model: StreamedModel, ids: Tensor, reader: CheckpointReader | None) -> Iterator[Tensor]:
    if reader is not None:
        _fill_outer(model, reader)
    hidden, _ = model.start(ids)
    for index in range(len(model)):
        block = model.load_block(index)
        if reader is not None:
            _fill(block, reader, model, index)
        hidden = torch.cat([model.run_block(block, index, row[None]) for row in hidden])
    for row in hidden:
        yield model.logits(row[None])[0]


def _fill_outer(model: StreamedModel, reader: CheckpointReader) -> None:
    for name, parameter in model.skeleton.named_parameters():
        if (stored := model.weights.stored_name(name)) in reader.tensors and stored != HEAD:
            parameter.data = reader.load(stored).to(parameter)
    head, head_name = model.skeleton.get_output_embeddings(), HEAD.rpartition(".")[0]
    if HEAD in reader.tensors and (kind := module_type(reader.description, head_name)).spec.is_quantized:
        head.forward = SimulatedLinear(layer_tensors(reader, head_name, kind), kind, head.bias).forward
    elif HEAD in reader.tensors:
        head.weight = nn.Parameter(reader.load(HEAD).to(head.weight), requires_grad=False)


def _fill(block: nn.Module, reader: CheckpointReader, model: StreamedModel, index: int) -> None:
    """Replace a float block's parameters by the checkpoint's, and its quantized linear layers by simulated ones."""
    name = model.block_name(index)
    stored = {
        local: model.stored_linear(index, local)
        for local, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    kinds = {
        local: module_type(reader.description, full)
        for local, full in stored.items()
        # Experts that stay FLOAT may be in one tensor, which is not described by their names.
        if kind_of(full) is not Kind.EXPERTS or full in reader.description.modules
    }
    quantized = {local: kind for local, kind in kinds.items() if kind.spec.is_quantized}
    for local, parameter in block.named_parameters():
        full, owner = f"{name}.{local}", local.rpartition(".")[0]
        is_codes = owner in quantized and local.endswith(f".{WEIGHT}")
        if full in reader.tensors and not is_codes:
            parameter.data = reader.load(full).to(parameter)
    for local, kind in quantized.items():
        bias = block.get_submodule(local).bias
        assert bias is None or isinstance(bias, Tensor)
        tensors = layer_tensors(reader, stored[local], kind)
        block.set_submodule(local, SimulatedLinear(tensors, kind, bias))


def layer_tensors(reader: CheckpointReader, name: str, kind: QuantType) -> dict[str, Tensor]:
    """The tensors of a linear layer, by suffix: as stored, but with one int4 value per byte and with one scale.

    Raises:
        CalibrationError: the table of types does not say which tensors layers of this type have, or their activations
            have static scales.
    """
    if not kind.spec.is_described or kind.spec.tensor(INPUT_SCALE):
        raise CalibrationError(
            f"{reader.directory}: layer {name} has quant type {kind}, whose arithmetic is not known here. Simulate a "
            "checkpoint without such layers."
        )
    suffixes = (tensor.suffix for tensor in kind.spec.tensors)
    tensors = {suffix: reader.load(f"{name}.{suffix}") for suffix in suffixes if f"{name}.{suffix}" in reader.tensors}
    if is_packed({suffix: reader.tensors[f"{name}.{suffix}"] for suffix in tensors}, kind):
        tensors[WEIGHT] = unpack_rows(tensors[WEIGHT])
    if WEIGHT_SCALE_SECOND in tensors:  # the offsets next to it are zero
        tensors[WEIGHT_SCALE] = tensors[WEIGHT_SCALE].float() * tensors.pop(WEIGHT_SCALE_SECOND).float()
        tensors.pop(WEIGHT_OFFSET, None)
    return tensors


class SimulatedLinear(nn.Module):
    """One quantized linear layer in float arithmetic, from the table entry of its type alone.

    Args:
        tensors: as stored, by suffix.
        kind: its quant type.
        bias: [output_size] or None.
    """

    def __init__(self, tensors: Mapping[str, Tensor], kind: QuantType, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = dequantize(tensors[WEIGHT].float(), tensors[WEIGHT_SCALE], tensors.get(WEIGHT_OFFSET))
        self.bias, self.bits = bias, kind.spec.activation_bits
        self.left, self.right = tensors.get(LEFT_TRANS), tensors.get(RIGHT_TRANS)
        self.clip = tensors[CLIP_RATIO].item() if CLIP_RATIO in tensors else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_size] -> [..., output_size]."""
        x = quantize_tokens(apply_kronecker(x, self.left, self.right), self.clip, self.bits)
        return nn.functional.linear(x, self.weight, self.bias)
