# SPDX-License-Identifier: Apache-2.0
"""Training of the quantized model: gradients, what it changes, what it gains."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.calibration.test_pipeline import quantize
from tests.conftest import MICRO
from vllm_w4a4_plugin.calibration import distill
from vllm_w4a4_plugin.calibration.block import BlockQuantizer
from vllm_w4a4_plugin.calibration.distill import TrainableLinear
from vllm_w4a4_plugin.calibration.model import StreamedModel
from vllm_w4a4_plugin.calibration.simulate import SimulatedLinear, float_logits, quantized_logits
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings

LAYER = "model.layers.1.self_attn.k_proj"


def layer() -> tuple[TrainableLinear, SimulatedLinear]:
    reader = CheckpointReader(MICRO)
    prefix = f"{LAYER}."
    tensors = {name.removeprefix(prefix): reader.load(name) for name in reader.tensors if name.startswith(prefix)}
    exact = SimulatedLinear(reader, LAYER, QuantType.W4A4_FLATQUANT_DYNAMIC, None)
    return TrainableLinear(tensors, 4, None), exact


def test_it_starts_as_the_stored_layer_and_stores_it_unchanged() -> None:
    trainable, exact = layer()
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(trainable(x), exact(x), rtol=1e-5, atol=1e-6)
    reader = CheckpointReader(MICRO)
    for suffix, tensor in trainable.stored().items():
        assert torch.equal(tensor, reader.load(f"{LAYER}.{suffix}"))


def test_gradient_of_scales_is_the_numerical_one() -> None:
    """Scales are not rounded, so that finite differences apply; float64 keeps them exact."""
    trainable, _ = layer()
    trainable.double()
    trainable.codes = trainable.codes.double()
    trainable.scale = trainable.scale.double()
    trainable.left, trainable.right = trainable.left.double(), trainable.right.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 192, generator=generator, dtype=torch.float64)
    direction = torch.randn(128, 1, generator=generator, dtype=torch.float64)
    target = torch.randn(5, 128, generator=generator, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (trainable(x) * target).sum()

    loss().backward()
    slope = (trainable.log_scale.grad * direction).sum().item()
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            trainable.log_scale.copy_(step * direction)
            values.append(loss().item())
    assert abs((values[0] - values[1]) / 2e-5 - slope) < 1e-6 * abs(slope) + 1e-8


def divergence(directory: Path, checkpoint: Path, ids: torch.Tensor) -> float:
    exact = torch.stack(list(float_logits(StreamedModel(directory), ids))).log_softmax(-1)
    found = torch.stack(list(quantized_logits(StreamedModel(directory), checkpoint, ids))).log_softmax(-1)
    return (exact.exp() * (exact - found)).sum(-1).mean().item()


def test_it_repairs_scales(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row scales that are wrong by a fifth are the kind of error that training must take back."""
    original = BlockQuantizer._collect

    def disturbed(self: BlockQuantizer) -> tuple[dict[str, torch.Tensor], dict[str, QuantType]]:
        tensors, types = original(self)
        generator = torch.Generator().manual_seed(self.index)
        for name, tensor in tensors.items():
            if name.endswith("weight_scale"):
                tensor.mul_(torch.exp(0.2 * torch.randn(tensor.shape, generator=generator)))
        return tensors, types

    monkeypatch.setattr(BlockQuantizer, "_collect", disturbed)
    monkeypatch.setattr(distill, "SCALE_STEP", 1e-2)
    directory = float_model("qwen3")
    before = quantize(directory, tmp_path / "before", ids, "all-w4a4")
    after = quantize(directory, tmp_path / "after", ids, "all-w4a4", distill=120)
    reader, start = CheckpointReader(after), CheckpointReader(before)
    assert [*header_findings(reader), *value_findings(reader)] == []
    assert {n: (t.dtype, t.shape) for n, t in reader.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in start.tensors.items()
    }
    for name in reader.tensors:
        if name.endswith(("proj.weight", "_trans")):
            assert torch.equal(reader.load(name), start.load(name))
    assert divergence(directory, after, ids) < 0.7 * divergence(directory, before, ids)
