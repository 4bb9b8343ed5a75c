# SPDX-License-Identifier: Apache-2.0
"""Lower bounds against a table worked out by hand: Qwen3-32B's linears on one 910B2 (1.6 TB/s, 1416 TOPS int4)."""

import pytest

from vllm_w4a4_plugin.capacity.devices import find_device
from vllm_w4a4_plugin.capacity.roofline import linear_time
from vllm_w4a4_plugin.checkpoint import QuantType

DEVICE = find_device("910B2")
SHAPES = {"qkv": (10240, 5120), "o": (5120, 8192), "gate_up": (51200, 5120), "down": (5120, 25600)}


@pytest.mark.parametrize(
    ("tokens", "microseconds"),
    [
        (1, {"qkv": 16, "o": 13, "gate_up": 82, "down": 41}),
        (1024, {"qkv": 76, "o": 61, "gate_up": 379, "down": 190}),
        (4096, {"qkv": 303, "o": 243, "gate_up": 1517, "down": 759}),
    ],
)
def test_w4a4_linears(tokens: int, microseconds: dict[str, int]) -> None:
    for name, (output_size, input_size) in SHAPES.items():
        kind = QuantType.W4A4_FLATQUANT_DYNAMIC
        assert 1e6 * linear_time(kind, output_size, input_size, tokens, DEVICE) == pytest.approx(
            microseconds[name], rel=2e-3, abs=0.6
        )


@pytest.mark.parametrize(
    ("kind", "milliseconds"),
    [("W4A4_DYNAMIC", (9.8, 45, 181)), ("W8A8_DYNAMIC", (19.5, 90, 361)), ("FLOAT", (39.0, 181, 722))],
)
def test_64_layers(kind: str, milliseconds: tuple[float, ...]) -> None:
    for tokens, expected in zip((1, 1024, 4096), milliseconds, strict=True):
        seconds = 64 * sum(linear_time(QuantType(kind), *s, tokens, DEVICE) for s in SHAPES.values())
        assert 1e3 * seconds == pytest.approx(expected, rel=0.01)


def test_w4a4_turns_from_memory_to_compute_at_221_tokens() -> None:
    kind = QuantType.W4A4_DYNAMIC
    one = linear_time(kind, 10240, 5120, 1, DEVICE)
    assert linear_time(kind, 10240, 5120, 221, DEVICE) == one
    assert linear_time(kind, 10240, 5120, 223, DEVICE) > one


def test_20_cubes_are_slower_than_24() -> None:
    kind = QuantType.W4A4_DYNAMIC
    slow, fast = (linear_time(kind, 10240, 5120, 4096, find_device(name)) for name in ("910B3", "910B2"))
    assert slow / fast == pytest.approx(1.2, rel=0.01)
