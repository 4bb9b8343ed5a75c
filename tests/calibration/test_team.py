# SPDX-License-Identifier: Apache-2.0
"""Sharing of work between devices, and tensors that live in files."""

import threading
from pathlib import Path

import pytest
import torch
from vllm_w4a4_plugin.calibration.team import Team

from vllm_w4a4_plugin.calibration.activations import Activations


@pytest.mark.parametrize("members", [1, 2, 3])
def test_results_come_in_order_and_items_go_round(members: int) -> None:
    parameter = torch.ones(1, requires_grad=True)

    def work(item: int, member: int) -> tuple[int, int, bool]:
        return item, member, (parameter * 2).requires_grad

    found = list(Team([torch.device("cpu")] * members).map(work, iter(range(7))))
    assert found == [(item, item % members, False) for item in range(7)]


def test_members_work_at_the_same_time() -> None:
    barrier = threading.Barrier(2, timeout=30)  # one member alone would wait for ever

    def work(item: int, member: int) -> int:
        barrier.wait()
        return item

    assert list(Team([torch.device("cpu")] * 2).map(work, [5, 6])) == [5, 6]


def test_an_error_in_a_member_is_raised() -> None:
    def work(item: int, member: int) -> int:
        raise MemoryError(f"member {member}")

    with pytest.raises(MemoryError, match="member 0"):
        list(Team([torch.device("cpu")] * 2).map(work, [5, 6]))


def test_files_have_no_names_and_are_large_enough(tmp_path: Path) -> None:
    tensor = Activations(tmp_path).empty(30, 7)
    tensor.copy_(torch.arange(210.0).view(30, 7))
    assert tensor.sum() == 209 * 105
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_not_a_signal() -> None:
    with pytest.raises(OSError, match=r"space|large"):
        Activations(Path("/dev/shm")).empty(2**42)
