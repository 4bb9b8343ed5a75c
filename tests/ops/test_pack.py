# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_w4a4_plugin import ops

sizes = st.integers(1, 70)


def random_int4(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@given(sizes, sizes, st.integers(0, 99))
def test_packing_loses_nothing(rows: int, columns: int, seed: int) -> None:
    weight = random_int4(rows, columns, seed)
    packed = ops.pack_int4(weight)
    assert packed.shape == ops.packed_int4_shape(rows, columns)
    assert torch.equal(ops.unpack_int4(packed, rows, columns), weight)


@given(sizes, sizes, st.data())
@settings(deadline=None)
def test_rows_can_be_packed_in_any_pieces(rows: int, columns: int, data: st.DataObject) -> None:
    weight = random_int4(rows, columns, 0)
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=3))})
    packed = torch.zeros(ops.packed_int4_shape(rows, columns), dtype=torch.int8)
    for first, last in reversed(list(itertools.pairwise(cuts))):
        ops.pack_int4_rows_(packed, weight[first:last].contiguous(), first)
    assert torch.equal(ops.unpack_int4(packed, rows, columns), weight)


def test_the_layout_is_the_documented_one() -> None:
    """Byte 4 r + j of a block: row r, feature j in the low nibble, feature j + 4 in the high one, each plus 8."""
    weight = random_int4(20, 19, 1)
    packed = ops.pack_int4(weight)
    for row, feature in ((0, 0), (5, 3), (15, 7), (16, 4), (19, 18)):
        byte = int(packed[row // 16, feature // 8, 4 * (row % 16) + feature % 4])
        nibble = byte >> 4 if feature % 8 >= 4 else byte & 15
        assert nibble - 8 == weight[row, feature]


def test_half_a_byte_per_value() -> None:
    assert ops.pack_int4(random_int4(256, 512, 0)).numel() == 256 * 512 // 2


@pytest.mark.parametrize("value", [-9, 8, 127, -128])
def test_values_outside_int4_are_refused_with_their_place(value: int) -> None:
    weight = random_int4(40, 33, 0)
    weight[17, 9] = value
    with pytest.raises(RuntimeError, match=rf"found {value} in row 17, column 9"):
        ops.pack_int4(weight)


def test_rows_that_do_not_fit_are_refused() -> None:
    packed = torch.zeros(ops.packed_int4_shape(16, 8), dtype=torch.int8)
    with pytest.raises(RuntimeError, match="first_row"):
        ops.pack_int4_rows_(packed, random_int4(8, 8, 0), 9)
    with pytest.raises(RuntimeError, match="packed: expected"):
        ops.pack_int4_rows_(packed, random_int4(8, 17, 0), 0)
