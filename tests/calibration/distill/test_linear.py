# SPDX-License-Identifier: Apache-2.0
"""Trainable linear layers and norms: gradients, and what is stored."""

import pytest
import torch

from tests.conftest import MICRO
from vllm_w4a4_plugin.calibration.distill.linear import RelativeWeight, TrainableLinear
from vllm_w4a4_plugin.calibration.simulate import SimulatedLinear, layer_tensors
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType

LAYER = "model.layers.1.self_attn.k_proj"


def layer() -> tuple[TrainableLinear, SimulatedLinear]:
    kind = QuantType.W4A4_FLATQUANT_DYNAMIC
    tensors = layer_tensors(CheckpointReader(MICRO), LAYER, kind)
    return TrainableLinear(tensors, 4, None), SimulatedLinear(tensors, kind, None)


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


@pytest.mark.parametrize("groups", [1, 4])
def test_groups_and_offsets_are_those_of_the_simulated_layer(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randint(-8, 8, (6, 32), generator=generator, dtype=torch.int8),
        "weight_scale": torch.rand(6, groups, generator=generator) + 0.5,
        "weight_offset": torch.randint(-3, 4, (6, groups), generator=generator).float(),
    }
    trainable = TrainableLinear(tensors, 4, None)
    x = torch.randn(5, 32, generator=generator)
    exact = SimulatedLinear(tensors, QuantType.W4A4_DYNAMIC, None)
    assert torch.allclose(trainable(x), exact(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(trainable.stored()["weight_scale"], tensors["weight_scale"])


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
