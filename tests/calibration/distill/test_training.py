# SPDX-License-Identifier: Apache-2.0
"""Training of the quantized model: what it changes, and what it gains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibration.running import quantize
from vllm_w4a4_plugin.calibration.block import quantizer
from vllm_w4a4_plugin.calibration.distill import schedule
from vllm_w4a4_plugin.calibration.model.block import LoadedBlock
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.calibration.simulate import float_logits, quantized_logits
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings


def divergence(directory: Path, checkpoint: Path, ids: torch.Tensor) -> float:
    exact = torch.stack(list(float_logits(StreamedModel(directory), ids))).log_softmax(-1)
    found = torch.stack(list(quantized_logits(StreamedModel(directory), checkpoint, ids))).log_softmax(-1)
    return (exact.exp() * (exact - found)).sum(-1).mean().item()


def test_it_repairs_scales(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight scales that are wrong by a fifth are the kind of error that training must correct."""
    original = quantizer.collect_tensors

    def disturbed(block: LoadedBlock, linears: Any) -> tuple[dict[str, torch.Tensor], dict[str, QuantType]]:
        tensors, types = original(block, linears)
        generator = torch.Generator().manual_seed(block.index)
        for name, tensor in tensors.items():
            if name.endswith("weight_scale"):
                tensor.mul_(torch.exp(0.2 * torch.randn(tensor.shape, generator=generator)))
        return tensors, types

    monkeypatch.setattr(quantizer, "collect_tensors", disturbed)
    monkeypatch.setitem(schedule.RATES, "log_scale", 1e-2)
    directory = float_model("qwen3")
    before = quantize(directory, tmp_path / "before", ids, "all-w4a4")
    after = quantize(directory, tmp_path / "after", ids, "all-w4a4", distill=120)
    reader, start = CheckpointReader(after), CheckpointReader(before)
    assert [*header_findings(reader), *value_findings(reader)] == []
    assert {n: (t.dtype, t.shape) for n, t in reader.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in start.tensors.items()
    }
    for name in reader.tensors:
        if name.endswith("proj.weight"):
            assert torch.equal(reader.load(name), start.load(name))
        elif name.endswith("_trans"):
            assert not torch.equal(reader.load(name), start.load(name))
    assert divergence(directory, after, ids) < 0.7 * divergence(directory, before, ids)
