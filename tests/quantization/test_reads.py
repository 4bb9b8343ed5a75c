# SPDX-License-Identifier: Apache-2.0
"""Which tensors, and which parts of them, a load reads."""

import torch

from vllm_w4a4_plugin.quantization.loading.reads import ReadTracker


def test_parts_are_reported_once_before_they_are_read() -> None:
    target = torch.zeros(2, 3)
    parts: list[tuple[str, torch.Tensor]] = []

    def on_read(name: str, values: torch.Tensor) -> None:
        assert not target.any()
        parts.append((name, values.clone()))

    tracker = ReadTracker(on_read)
    first, second = torch.arange(12.0).reshape(4, 3) + 1, torch.ones(2, 3)
    with tracker:
        for _, tensor in tracker.watch([("first", first), ("second", second)]):
            part = tensor.narrow(0, 1, 2) if len(tensor) == 4 else None
            if part is not None:
                target.copy_(part)
                target.zero_()
                target.copy_(part)
    assert [name for name, _ in parts] == ["first"]
    assert torch.equal(parts[0][1], first[1:3])
    assert tracker.read == {"first"}
    assert tracker.offered == {"first", "second"}


def test_a_tensor_that_comes_again_is_reported_again() -> None:
    count = 0

    def on_read(name: str, values: torch.Tensor) -> None:
        nonlocal count
        count += 1

    tracker = ReadTracker(on_read)
    tensor = torch.ones(3)
    with tracker:
        for _ in range(2):
            for _, watched in tracker.watch([("tensor", tensor)]):
                torch.zeros(3).copy_(watched)
                torch.zeros(3).copy_(watched)
    assert count == 2
