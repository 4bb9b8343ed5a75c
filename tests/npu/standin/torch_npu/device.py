# SPDX-License-Identifier: Apache-2.0
"""What `torch.npu` says of the device, events, and graphs: a graph records operators and runs them again."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

name = "Ascend910B2"
cores = (24, 48)
memory = (60 << 30, 64 << 30)
"""Free and total bytes. Tests change these three."""


def get_device_name(index: int = 0) -> str:
    return name


def get_device_properties(index: int = 0) -> Any:
    return SimpleNamespace(name=name, total_memory=memory[1], cube_core_num=cores[0], vector_core_num=cores[1])


def mem_get_info(index: int = 0) -> tuple[int, int]:
    return memory


class Event:
    """A point in time; everything is done when it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds."""
        return 1e3 * (end.at - self.at)


class Stream:
    """The only one."""

    def record_event(self) -> Event:
        event = Event()
        event.record()
        return event


def current_stream() -> Stream:
    return Stream()


class NPUGraph:
    """Operators on tensors that stay where they are."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            pairs = zip(torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(again), strict=True)
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: NPUGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        kept = tree_map_only(torch.Tensor, lambda tensor: tensor, result)
        self.graph.calls.append((function, args, kwargs or {}, kept))
        return result


@contextmanager
def graph(captured: NPUGraph) -> Iterator[None]:
    with _Recorder(captured):
        yield
