# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a finished checkpoint computed in plain torch from the stored codes, one block at a time.

Independent of vLLM and of the plugin's kernels: what calibration believes the checkpoint to be.
"""

from collections.abc import Iterator
from math import exp
from pathlib import Path

import torch
from torch import Tensor, nn

from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.resolve import module_type

from .block.rounding import quantize_tokens
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
            _fill(block, reader, model.block_name(index))
        hidden = torch.cat([model.run_block(block, index, row[None]) for row in hidden])
    for row in hidden:
        yield model.logits(row[None])[0]


def _fill_outer(model: StreamedModel, reader: CheckpointReader) -> None:
    for name in model.outer_names():
        parameter = model.skeleton.get_parameter(name)
        parameter.data = reader.load(name).to(parameter)
    head = model.skeleton.get_output_embeddings()
    if HEAD in reader.tensors:
        head.weight = nn.Parameter(reader.load(HEAD).to(head.weight), requires_grad=False)


def _fill(block: nn.Module, reader: CheckpointReader, name: str) -> None:
    """Replace a float block's parameters by the checkpoint's, and its linear layers by simulated ones."""
    for local, parameter in block.named_parameters():
        full = f"{name}.{local}"
        if full in reader.tensors and reader.tensors[full].dtype != "I8":
            parameter.data = reader.load(full).to(parameter)
    for local, module in list(block.named_modules()):
        if isinstance(module, nn.Linear):
            kind = module_type(reader.description, f"{name}.{local}")
            if kind is not QuantType.FLOAT:
                simulated = SimulatedLinear(reader, f"{name}.{local}", kind, module.bias)
                block.set_submodule(local, simulated)


class SimulatedLinear(nn.Module):
    """One quantized linear layer in float arithmetic."""

    def __init__(self, reader: CheckpointReader, name: str, kind: QuantType, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = reader.load(f"{name}.weight").float() * reader.load(f"{name}.weight_scale")
        self.bias, self.bits = bias, 4 if kind.is_w4a4 else 8

        def optional(suffix: str) -> Tensor | None:
            return reader.load(f"{name}.{suffix}") if f"{name}.{suffix}" in reader.tensors else None

        self.left, self.right, clip = optional("left_trans"), optional("right_trans"), optional("clip_ratio")
        self.clip = 1.0 if clip is None else clip.item()

    def forward(self, x: Tensor) -> Tensor:
        x = quantize_tokens(apply_kronecker(x, self.left, self.right), self.clip, self.bits)
        return nn.functional.linear(x, self.weight, self.bias)
