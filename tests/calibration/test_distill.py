# SPDX-License-Identifier: Apache-2.0
"""Training of the quantized model: gradients, what it changes, what it gains."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.calibration.test_pipeline import quantize
from tests.conftest import MICRO
from vllm_w4a4_plugin.calibration import distill
from vllm_w4a4_plugin.calibration.block import BlockQuantizer
from vllm_w4a4_plugin.calibration.distill import RelativeWeight, TrainableLinear, shorter_rows
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


@pytest.mark.parametrize("name", ["log_scale", "left_change", "right_change"])
def test_gradients_are_the_numerical_ones(name: str) -> None:
    """With 40 bits rounding is too fine to be seen, so that finite differences apply; float64 keeps them exact."""
    trainable, _ = layer()
    trainable.bits = 40
    trainable.double()
    trainable.codes, trainable.clip = trainable.codes.double(), torch.ones(1, dtype=torch.float64)
    trainable.scale = trainable.scale.double()
    assert trainable.left is not None
    assert trainable.right is not None
    trainable.left, trainable.right = trainable.left.double(), trainable.right.double()
    parameter = trainable.get_parameter(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 192, generator=generator, dtype=torch.float64)
    direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    target = torch.randn(5, 128, generator=generator, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (trainable(x) * target).sum()

    loss().backward()
    assert parameter.grad is not None
    slope = (parameter.grad * direction).sum().item()
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            parameter.copy_(step * direction)
            values.append(loss().item())
    assert abs((values[0] - values[1]) / 2e-5 - slope) < 1e-6 * abs(slope) + 1e-8


def test_trained_layer_is_the_one_that_is_stored() -> None:
    trainable, _ = layer()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    stored = {"weight": trainable.codes, **trainable.stored()}
    x = torch.randn(5, 192, generator=generator)
    assert torch.equal(TrainableLinear(stored, 4, None)(x), trainable(x))


@given(st.integers(1, 4), st.integers(1, 700), st.integers(1, 300))
def test_shorter_rows_are_parts_of_the_rows(rows: int, width: int, length: int) -> None:
    ids = torch.arange(rows * width).view(rows, width)
    cut = shorter_rows(ids, length)
    assert cut.shape[1] <= length
    assert len(cut) % rows == 0
    left_out = width - len(cut) // rows * cut.shape[1]
    assert 0 <= left_out < len(cut) // rows
    assert torch.equal(cut.reshape(rows, -1), ids[:, : width - left_out])


def test_norms_are_trained_in_their_stored_precision() -> None:
    start = torch.tensor([1e-4, 0.3, -2.0, 0.0], dtype=torch.bfloat16)
    weight = RelativeWeight(start)
    assert torch.equal(weight(torch.zeros(4)).to(start), start)
    change = torch.full((4,), 0.01, requires_grad=True)
    found = weight(change)
    assert torch.equal(found, found.to(start).float())
    assert torch.allclose(found, start.float() * 1.01, rtol=2**-8)
    found.sum().backward()
    assert change.grad is not None
    assert torch.allclose(change.grad, start.float() * change.detach().exp())


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
    monkeypatch.setitem(distill.RATES, "log_scale", 1e-2)
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
