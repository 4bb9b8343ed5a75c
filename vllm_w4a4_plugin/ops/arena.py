# SPDX-License-Identifier: Apache-2.0
"""Memory of packed weights: they lie side by side in a few large areas, so that huge pages cover all of each.

An area of its own would begin and end in small pages, for a weight of a few MiB a third of it, and a decode step, which
reads every weight once, would wait for their addresses. Pages are placed where they are touched first.
"""

import math
import mmap
from threading import Lock

import torch
from torch import Tensor

from .cpu import load_library

AREA = 64 << 20
"""Bytes of an area; what no weight has touched of it is only an address. A weight that needs more gets its own."""

HUGE_PAGE = 2 << 20
PAGE = mmap.PAGESIZE

_lock = Lock()
_area: "_Area | None" = None


class _Area:
    """An anonymous mapping, from a boundary of huge pages on. It lives as long as a tensor in it does."""

    def __init__(self, size: int) -> None:
        self.mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(self.mapping, dtype=torch.uint8)
        self.used = -whole.data_ptr() % HUGE_PAGE
        self.end = self.used + size
        torch.ops.vllm_w4a4.place_by_touch_(whole[self.used : self.end])

    @property
    def left(self) -> int:
        return self.end - self.used

    def take(self, size: int) -> Tensor:
        taken = torch.frombuffer(self.mapping, dtype=torch.uint8, offset=self.used, count=size)
        self.used = min(self.end, self.used + -(-size // PAGE) * PAGE)
        return taken


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor of one-byte values that nobody has touched, with a storage of its own.

    Args:
        shape: of at least one value.
        dtype: int8 or uint8.
    """
    global _area
    load_library()
    size = math.prod(shape)
    with _lock:
        area = _area
        if area is None or area.left < size:
            area = _Area(max(AREA, size))
        taken = area.take(size)
        open_areas = [place for place in (_area, area) if place is not None and place.left > 0]
        _area = max(open_areas, key=lambda place: place.left, default=None)
    return taken.view(dtype).view(shape)
