# SPDX-License-Identifier: Apache-2.0
"""The operators as torch sees them: schemas, fake implementations, compiled graphs, argument errors."""

import re
from typing import Any

import pytest
import torch

from vllm_w4a4_plugin import ops

OUT, LEFT, RIGHT = 40, 12, 16
FEATURES = LEFT * RIGHT


def operands(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (OUT, FEATURES), dtype=torch.int8, generator=generator)
    return {
        "x": torch.randn(3, FEATURES, generator=generator).to(dtype),
        "weight_packed": ops.pack_int4(weight),
        "weight_scale": torch.rand(OUT, generator=generator),
        "left_trans": torch.randn(LEFT, LEFT, generator=generator),
        "right_trans": torch.randn(RIGHT, RIGHT, generator=generator),
        "clip_ratio": torch.tensor([0.9]),
        "bias": torch.randn(OUT, generator=generator).to(dtype),
        "weight_offset": torch.randn(OUT, generator=generator),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    # "test_aot_dispatch_dynamic" is for differentiable operators; these are for inference.
    utilities = ("test_schema", "test_faketensor")
    a = operands(dtype)
    q, scale = ops.kronecker_quant(a["x"], a["left_trans"], a["right_trans"], a["clip_ratio"])
    rows = torch.zeros(5, FEATURES, dtype=torch.int8)
    packed_int8 = torch.zeros(ops.packed_int8_shape(OUT, FEATURES), dtype=torch.int8)
    namespace = torch.ops.vllm_w4a4
    for operator, args in [
        (namespace.flatquant_linear, tuple(a.values())),
        (namespace.flatquant_linear, (*tuple(a.values())[:3], None, None, a["clip_ratio"])),
        (namespace.kronecker_quant, (a["x"], a["left_trans"], a["right_trans"], a["clip_ratio"])),
        (namespace.int4_linear, (q, scale, a["weight_packed"], a["weight_scale"], a["bias"], None, dtype)),
        (namespace.unpack_int4, (a["weight_packed"], OUT, FEATURES)),
        (namespace.pack_int4_rows_, (a["weight_packed"].clone(), rows, 7)),
        (namespace.w8a8_linear, (a["x"], packed_int8, a["weight_scale"])),
        (namespace.kronecker_quant, (a["x"], None, None, a["clip_ratio"], 8, torch.ones(3))),
        (namespace.pack_int8_rows_, (packed_int8, rows, 7)),
        (namespace.silu_and_mul, (a["x"],)),
    ]:
        torch.library.opcheck(operator.default, args, test_utils=utilities)


def test_compiled_graphs_give_the_same_and_see_a_new_clip_ratio() -> None:
    a = operands()

    def linear(x: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
        y = ops.flatquant_linear(
            x * 2, a["weight_packed"], a["weight_scale"], a["left_trans"], a["right_trans"], clip, a["bias"]
        )
        return y + 1

    compiled = torch.compile(linear, fullgraph=True, dynamic=True)
    clip = torch.tensor([0.9])
    for tokens in (3, 2, 1):
        x = a["x"][:tokens].contiguous()
        torch.testing.assert_close(compiled(x, clip), linear(x, clip))
    clip.fill_(0.5)
    torch.testing.assert_close(compiled(a["x"], clip), linear(a["x"], clip))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(3, FEATURES, dtype=torch.float64)}, ["x: expected float32, bfloat16 or float16"]),
        ({"x": torch.zeros(FEATURES, 3).T}, ["x: expected a contiguous tensor", "[3, 192]"]),
        ({"x": torch.zeros(3, FEATURES + 1)}, ["12 x 16", "193 input features"]),
        ({"left_trans": torch.zeros(LEFT, LEFT + 1)}, ["left_trans: expected a square matrix", "[12, 13]"]),
        ({"right_trans": torch.zeros(RIGHT, RIGHT).double()}, ["right_trans: expected float32"]),
        ({"left_trans": None, "right_trans": torch.zeros(5, 5)}, ["38 x 5", "192"]),
        ({"clip_ratio": torch.tensor([0.0])}, ["clip_ratio: expected a value in (0, 1]"]),
        ({"clip_ratio": torch.tensor([1.01])}, ["clip_ratio", "1.01"]),
        ({"clip_ratio": torch.tensor([float("nan")])}, ["clip_ratio", "(0, 1]"]),
        ({"weight_packed": torch.zeros(2, 24, 64, dtype=torch.uint8)}, ["weight_packed", "[3, 24, 64]", "[2, 24, 64]"]),
        ({"weight_packed": torch.zeros(3, 24, 64)}, ["weight_packed: expected int8 or uint8"]),
        ({"weight_scale": torch.rand(OUT, 7)}, ["weight_scale: 7 groups"]),
        ({"weight_scale": torch.rand(OUT, 48)}, ["48 groups", "multiples of 8"]),
        ({"weight_scale": torch.rand(OUT).double()}, ["weight_scale: expected float32"]),
        ({"bias": torch.rand(OUT + 1)}, ["bias: expected 40 values", "[41]"]),
        ({"weight_offset": torch.rand(OUT, 2)}, ["weight_offset: expected the shape of weight_scale"]),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], words: list[str]) -> None:
    a = {**operands(), **change}
    named = {"weight_offset": a.pop("weight_offset")} if "weight_offset" in a else {}
    with pytest.raises(RuntimeError) as caught:
        ops.flatquant_linear(*a.values(), **named)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("maximum", "words"),
    [
        (torch.ones(2), "token_maximum: expected one value for each of 3 tokens, found [2]"),
        (torch.ones(3).double(), "token_maximum: expected float32"),
    ],
)
def test_bad_largest_magnitudes_are_named(maximum: torch.Tensor, words: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(words)):
        ops.kronecker_quant(torch.randn(3, FEATURES), None, None, token_maximum=maximum)


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_w4a4_plugin.ops import cpu

    monkeypatch.setattr(cpu, "_is_loaded", False)
    monkeypatch.setattr(cpu, "LIBRARY", "libnothing.so")
    with pytest.raises(RuntimeError, match=r"CPU kernels were not built: libnothing\.so .*W4A4_CPU=OFF.*pip install"):
        ops.pack_int4(torch.zeros(1, 1, dtype=torch.int8))


def test_a_library_that_does_not_load_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from vllm_w4a4_plugin.ops import cpu

    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(cpu, "_is_loaded", False)
    monkeypatch.setattr(cpu, "library_places", lambda name: [broken])
    with pytest.raises(RuntimeError, match=r"cannot be loaded with torch .*build it again"):
        ops.pack_int4(torch.zeros(1, 1, dtype=torch.int8))
