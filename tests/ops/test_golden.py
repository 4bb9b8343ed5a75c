# SPDX-License-Identifier: Apache-2.0
"""Layers of a checkpoint made by msModelSlim against the outputs of the tool's own model.

The tool rounds its simulated weights to bfloat16, which puts the agreement of a right implementation at 1.6e-3.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import GOLDEN, MICRO
from tests.linears import relative_error
from vllm_w4a4_plugin import ops
from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.ops import reference

LAYERS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"]
TOLERANCE = 2e-3


class Layer:
    def __init__(self, name: str) -> None:
        reader, golden = CheckpointReader(MICRO), load_file(GOLDEN)
        prefix = f"model.layers.0.{name}"
        self.x, self.y = golden[f"{prefix}.input"], golden[f"{prefix}.output"]
        self.weight, self.scale = reader.load(f"{prefix}.weight"), reader.load(f"{prefix}.weight_scale").view(-1)
        self.left, self.right = reader.load(f"{prefix}.left_trans"), reader.load(f"{prefix}.right_trans")
        self.clip = reader.load(f"{prefix}.clip_ratio").item()


@pytest.mark.parametrize("name", LAYERS)
def test_native(name: str) -> None:
    layer = Layer(name)
    packed = ops.pack_int4(layer.weight)
    y = ops.flatquant_linear(layer.x, packed, layer.scale, layer.left, layer.right, layer.clip)
    assert relative_error(y, layer.y) < TOLERANCE


@pytest.mark.parametrize("name", LAYERS)
def test_reference(name: str) -> None:
    layer = Layer(name)
    y = reference.flatquant_linear(layer.x, layer.weight, layer.scale, layer.left, layer.right, layer.clip)
    assert relative_error(y, layer.y) < TOLERANCE


@pytest.mark.parametrize("name", LAYERS)
def test_with_the_tools_weight_rounding_the_reference_is_exact(name: str) -> None:
    layer = Layer(name)
    q, scale = reference.kronecker_quant(layer.x, layer.left, layer.right, layer.clip)
    rounded = (layer.weight.float() * layer.scale[:, None]).bfloat16().float()
    y = (q.float() * scale[:, None]) @ rounded.T
    assert relative_error(y, layer.y) < 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_readings_are_far_off(name: str) -> None:
    """Shows that the tolerance tells right from wrong."""
    layer = Layer(name)

    def error(left: torch.Tensor | None, right: torch.Tensor | None, clip: float) -> float:
        return relative_error(
            reference.flatquant_linear(layer.x, layer.weight, layer.scale, left, right, clip), layer.y
        )

    assert error(layer.left.T, layer.right, layer.clip) > 0.1
    assert error(layer.left, layer.right.T, layer.clip) > 0.1
    assert error(None, None, layer.clip) > 0.1
    assert error(layer.left, layer.right, 1.0) > 5 * TOLERANCE
