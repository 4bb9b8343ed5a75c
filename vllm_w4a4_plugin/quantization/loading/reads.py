# SPDX-License-Identifier: Apache-2.0
"""Which of the tensors that a model was given did it read?"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ReadTracker(TorchDispatchMode):
    """Notes, while it is active, which watched tensors an operator has read. Views of a tensor count as the tensor.

    Args:
        on_read: called with the name of a tensor and the part of it that an operator is about to read, once per part.

    Attributes:
        offered: names of all watched tensors.
        read: those that an operator other than a view has taken.
    """

    def __init__(self, on_read: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__()
        self._on_read = on_read
        self._parts: dict[str, set[tuple[int, torch.Size]]] = {}
        self.offered: set[str] = set()
        self.read: set[str] = set()
        # Storage -> (first byte, last byte, name) of the tensors in it; some loaders put many into one.
        self._places: dict[int, list[tuple[int, int, str]]] = {}

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same pairs, each watched from when it is taken."""
        for name, tensor in weights:
            self.offered.add(name)
            if tensor.numel() == 0:
                self.read.add(name)
            elif tensor.device.type != "meta":
                storage = tensor.untyped_storage().data_ptr()
                first = tensor.data_ptr()
                place = (first, first + tensor.numel() * tensor.element_size(), name)
                # A storage whose tensors are gone may be used again, so overlapping places are outdated.
                others = [p for p in self._places.get(storage, ()) if p[1] <= place[0] or place[1] <= p[0]]
                self._places[storage] = [*others, place]
                self._parts.pop(name, None)
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not func.is_view:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor) and value.device.type != "meta":
                    self._note(value)
        return func(*args, **kwargs)

    def _note(self, tensor: torch.Tensor) -> None:
        places = self._places.get(tensor.untyped_storage().data_ptr())
        if places and tensor.numel():
            first = tensor.data_ptr()
            for name in (name for low, high, name in places if low <= first < high):
                self.read.add(name)
                part, known = (first, tensor.shape), self._parts.setdefault(name, set())
                if part not in known:
                    known.add(part)
                    self._on_read(name, tensor)
