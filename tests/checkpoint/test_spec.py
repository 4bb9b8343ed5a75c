# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import MICRO
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader, QuantType, TensorInfo
from vllm_w4a4_plugin.checkpoint.spec import (
    assumed_spec,
    check_values,
    kronecker_sizes,
    linear_spec,
)

W4A4, DYNAMIC, W8A8 = QuantType.W4A4_FLATQUANT_DYNAMIC, QuantType.W4A4_DYNAMIC, QuantType.W8A8_DYNAMIC


def tensors(**shapes: Any) -> dict[str, TensorInfo]:
    infos = {}
    for suffix, shape in shapes.items():
        dtype = "I8" if suffix == "weight" else "F32"
        if isinstance(shape, tuple) and isinstance(shape[0], str):
            dtype, shape = shape[0], tuple(shape[1:])
        infos[f"m.{suffix}"] = TensorInfo(f"m.{suffix}", "f.safetensors", dtype, tuple(shape))
    return infos


FLATQUANT = {"weight": (8, 24), "weight_scale": (8, 1), "weight_offset": (8, 1), "left_trans": (4, 4),
             "right_trans": (6, 6), "clip_ratio": (1,)}  # fmt: skip


@pytest.mark.parametrize(
    ("features", "sizes"),
    [(384, (16, 24)), (576, (24, 24)), (4096, (64, 64)), (5120, (64, 80)), (8192, (64, 128)), (25600, (160, 160))],
)
def test_factor_sizes_are_the_tools(features: int, sizes: tuple[int, int]) -> None:
    assert kronecker_sizes(features) == sizes


@given(st.integers(1, 20000))
def test_factor_sizes_multiply_and_are_the_closest(features: int) -> None:
    if features % 4 == 2:
        with pytest.raises(ValueError, match="no pair"):
            kronecker_sizes(features)
        return
    left, right = kronecker_sizes(features)
    assert left * right == features
    closest = max(d for d in range(1, math.isqrt(features) + 1) if features % d == 0 and (d + features // d) % 2 == 0)
    assert left == closest


def test_real_layers() -> None:
    reader = CheckpointReader(MICRO)
    q = linear_spec(reader.tensors, "model.layers.0.self_attn.q_proj", W4A4)
    assert (q.output_size, q.input_size, q.left, q.right, q.groups, q.has_offset) == (256, 192, 12, 16, 1, True)
    down = linear_spec(reader.tensors, "model.layers.0.mlp.down_proj", QuantType.FLOAT)
    assert (down.output_size, down.input_size) == (192, 384)


@pytest.mark.parametrize("absent", ["left_trans", "right_trans"])
def test_a_missing_factor_is_allowed(absent: str) -> None:
    spec = linear_spec(tensors(**{k: v for k, v in FLATQUANT.items() if k != absent}), "m", W4A4)
    assert (spec.left, spec.right) == ((None, 6) if absent == "left_trans" else (4, None))


def test_groups_come_from_the_scale() -> None:
    spec = linear_spec(tensors(weight=(8, 512), weight_scale=(8, 2)), "m", DYNAMIC)
    assert spec.groups == 2
    assert linear_spec(tensors(weight=(8, 512), weight_scale=(8,)), "m", DYNAMIC).groups == 1


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (W4A4, {"weight": ("F32", 8, 24)}, ["m.weight", "I8", "F32"]),
        (W4A4, {"weight": (8, 24, 1)}, ["two dimensions"]),
        (W4A4, {"weight_scale": (7, 1)}, ["m.weight_scale", "[8, 1]", "[7, 1]"]),
        (W4A4, {"weight_offset": (8, 2)}, ["m.weight_offset"]),
        (W4A4, {"left_trans": (4, 6)}, ["m.left_trans", "square"]),
        (W4A4, {"left_trans": (3, 3)}, ["3 x 6", "24"]),
        (W4A4, {"left_trans": (5, 5), "right_trans": None}, ["5 x absent", "24"]),
        (W4A4, {"clip_ratio": (2,)}, ["m.clip_ratio", "one value"]),
        (W4A4, {"clip_ratio": None}, ["m.clip_ratio", "none of the weight files"]),
        (W4A4, {"weight": None}, ["m.weight", "none of the weight files"]),
        (W4A4, {"bias": (9,)}, ["m.bias", "[8]"]),
        (DYNAMIC, {}, ["m.left_trans", "no such tensor in a W4A4_DYNAMIC layer"]),
        (W8A8, {"weight_scale": (8, 2), "left_trans": None, "right_trans": None, "clip_ratio": None,
                "weight_offset": None}, ["one scale per output row"]),
        (QuantType("W8A8_MIX"), {}, ["W8A8_MIX cannot be run here"]),
        (QuantType.W8A8, {}, ["m.left_trans", "no such tensor in a W8A8 layer"]),
    ],
)  # fmt: skip
def test_bad_headers(kind: QuantType, change: dict[str, Any], words: list[str]) -> None:
    shapes = {key: value for key, value in {**FLATQUANT, **change}.items() if value is not None}
    with pytest.raises(CheckpointError) as caught:
        linear_spec(tensors(**shapes), "m", kind)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_spec_can_be_assumed_where_there_are_no_weights() -> None:
    description = CheckpointReader(MICRO).description
    name = "model.layers.0.self_attn.q_proj"
    assumed = assumed_spec(description, name, W4A4, input_size=192, output_size=256)
    assert assumed == linear_spec(CheckpointReader(MICRO).tensors, name, W4A4)


@pytest.mark.parametrize(
    ("suffix", "values", "word"),
    [
        ("weight", [[-8, 7]], None),
        ("weight", [[-9, 7]], "-9 to 7"),
        ("weight", [[0, 8]], "0 to 8"),
        ("weight_scale", [0.0, 1.0], None),
        ("weight_scale", [float("inf")], "1 of 1"),
        ("weight_scale", [float("nan"), 1.0], "1 of 2"),
        ("weight_scale", [-1.0], "not negative"),
        ("left_trans", [[float("nan")]], "finite"),
        ("clip_ratio", [1.0], None),
        ("clip_ratio", [0.0], "(0, 1]"),
        ("clip_ratio", [1.5], "(0, 1]"),
        ("clip_ratio", [float("nan")], "(0, 1]"),
    ],
)
def test_values(suffix: str, values: list[Any], word: str | None) -> None:
    dtype = torch.int8 if suffix == "weight" else torch.float32
    problem = check_values(suffix, torch.tensor(values, dtype=dtype), W4A4)
    assert problem == "" if word is None else word in problem


def test_int8_weights_may_use_their_whole_range() -> None:
    assert check_values("weight", torch.tensor([[-128, 127]], dtype=torch.int8), W8A8) == ""
