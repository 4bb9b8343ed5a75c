# SPDX-License-Identifier: Apache-2.0
import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_w4a4_plugin.ops import arena


@pytest.fixture
def small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "AREA", 4 * arena.HUGE_PAGE)
    monkeypatch.setattr(arena, "_area", None)


@given(st.lists(st.integers(1, 3 * arena.HUGE_PAGE), min_size=1, max_size=12))
@settings(deadline=None, max_examples=30)
def test_tensors_are_disjoint_and_begin_at_pages(sizes: list[int]) -> None:
    tensors = [arena.empty((size,), torch.uint8) for size in sizes]
    ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.numel()) for tensor in tensors)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    assert all(begin % arena.PAGE == 0 for begin, _ in ranges)
    # Files of weights are written by storage.
    assert all(tensor.untyped_storage().nbytes() == size for tensor, size in zip(tensors, sizes, strict=True))
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert all(bool((tensor == value).all()) for value, tensor in enumerate(tensors))


@pytest.mark.usefixtures("small_areas")
def test_small_tensors_share_huge_pages() -> None:
    first, second = (arena.empty((3, arena.HUGE_PAGE // 4), torch.int8) for _ in range(2))
    assert first.data_ptr() % arena.HUGE_PAGE == 0
    assert second.data_ptr() == first.data_ptr() + first.numel()
    assert (first.dtype, first.shape) == (torch.int8, (3, arena.HUGE_PAGE // 4))


@pytest.mark.usefixtures("small_areas")
def test_a_large_tensor_has_an_area_of_its_own() -> None:
    before = arena.empty((1,), torch.uint8)
    large = arena.empty((arena.AREA + 1,), torch.uint8)
    after = arena.empty((1,), torch.uint8)
    assert large.data_ptr() % arena.HUGE_PAGE == 0
    assert after.data_ptr() == before.data_ptr() + arena.PAGE


@pytest.mark.usefixtures("small_areas")
def test_memory_is_given_back_with_the_last_tensor() -> None:
    first, second = (arena.empty((arena.AREA,), torch.uint8) for _ in range(2))
    address = first.data_ptr()
    assert is_mapped(address)
    del first
    assert not is_mapped(address)
    assert is_mapped(second.data_ptr())


def is_mapped(address: int) -> bool:
    ranges = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)
