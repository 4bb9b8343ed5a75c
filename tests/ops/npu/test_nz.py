# SPDX-License-Identifier: Apache-2.0
"""The NPU's weight layout against its formula, element by element."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_w4a4_plugin.ops.npu.nz import nz_shape, pack_nz, unpack_nz

sizes = st.integers(1, 150)


def random_int4(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@given(sizes, sizes, st.integers(0, 99))
@settings(deadline=None)
def test_packing_loses_nothing(out_features: int, in_features: int, seed: int) -> None:
    weight = random_int4(out_features, in_features, seed)
    packed = pack_nz(weight)
    assert packed.shape == nz_shape(out_features, in_features)
    assert packed.is_contiguous()
    assert torch.equal(unpack_nz(packed, out_features, in_features), weight)


def test_every_nibble_is_where_the_formula_puts_it() -> None:
    out_features, in_features = 37, 130
    weight = random_int4(out_features, in_features, 1)
    data = bytes(pack_nz(weight).flatten().tolist())
    output_blocks = 3
    seen = 0
    for o in range(out_features):
        for k in range(in_features):
            fractal = (k // 64) * output_blocks + o // 16
            byte = data[fractal * 512 + (o % 16) * 32 + k % 64 // 2]
            nibble = byte >> 4 if k % 2 else byte & 0xF
            assert nibble - 16 * (nibble > 7) == weight[o, k]
            seen += nibble != 0
    # What lies beyond the weight is zero.
    assert sum((byte & 0xF != 0) + (byte >> 4 != 0) for byte in data) == seen


def test_whole_fractals_agree_with_the_published_reshape() -> None:
    """pack(W).reshape(n/16, 16, k/64, 32 bytes).transpose(2, 0, 1, 3), where nothing is padded."""
    weight = random_int4(64, 256, 2)
    pairs = (weight[:, 0::2].int() & 0xF) + (weight[:, 1::2].int() & 0xF) * 16
    expected = pairs.to(torch.uint8).reshape(4, 16, 4, 32).permute(2, 0, 1, 3)
    assert torch.equal(pack_nz(weight), expected)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((2, 2), 8, dtype=torch.int8), r"expected values in \[-8, 7\], found \[8, 8\]"),
        (torch.full((2, 2), -9, dtype=torch.int8), r"found \[-9, -9\]"),
        (torch.zeros(2, 2), "expected int8"),
        (torch.zeros(2, dtype=torch.int8), "expected int8"),
    ],
)
def test_other_weights_are_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_nz(weight)


def test_a_packed_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[2, 1, 16, 32\] for 16 x 128"):
        unpack_nz(pack_nz(random_int4(16, 64, 0)), 16, 128)
