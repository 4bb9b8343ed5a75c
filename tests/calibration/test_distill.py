# SPDX-License-Identifier: Apache-2.0
"""Training of the quantized model: gradients, what it changes, what it gains."""

from collections.abc import Callable
from pathlib import Path

import torch

from tests.calibration.test_pipeline import quantize
from tests.conftest import MICRO
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


def test_codes_get_the_gradient_of_the_unrounded_weight() -> None:
    trainable, _ = layer()
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trainable.codes[0, 0] = 9.0  # out of range: must not move further
    seen: list[torch.Tensor] = []
    original = torch.nn.functional.linear

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
        seen.append(x)
        return original(x, weight, bias)

    torch.nn.functional.linear = spy  # type: ignore[assignment]
    try:
        trainable(x).sum().backward()
    finally:
        torch.nn.functional.linear = original
    expected = seen[0].detach().sum(0) * trainable.scale
    expected[0, 0] = 0
    assert torch.allclose(trainable.codes.grad, expected, rtol=1e-4, atol=1e-6)


def divergence(directory: Path, checkpoint: Path, ids: torch.Tensor) -> float:
    exact = torch.stack(list(float_logits(StreamedModel(directory), ids))).log_softmax(-1)
    found = torch.stack(list(quantized_logits(StreamedModel(directory), checkpoint, ids))).log_softmax(-1)
    return (exact.exp() * (exact - found)).sum(-1).mean().item()


def test_it_comes_nearer_to_the_float_model(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    directory = float_model("qwen3")
    before = quantize(directory, tmp_path / "before", ids, "all-w4a4")
    after = quantize(directory, tmp_path / "after", ids, "all-w4a4", distill=360)
    reader = CheckpointReader(after)
    assert [*header_findings(reader), *value_findings(reader)] == []
    assert {n: (t.dtype, t.shape) for n, t in reader.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in CheckpointReader(before).tensors.items()
    }
    assert divergence(directory, after, ids) < 0.8 * divergence(directory, before, ids)
