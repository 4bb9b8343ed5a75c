# SPDX-License-Identifier: Apache-2.0
"""Sharing of work among devices."""

import threading

import pytest
import torch

from vllm_w4a4_plugin.calibration.devices import DevicePool
from vllm_w4a4_plugin.calibration.errors import CalibrationError


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_order_and_items_are_dealt_in_turn(count: int) -> None:
    parameter = torch.ones(1, requires_grad=True)

    def work(item: int, position: int) -> tuple[int, int, bool]:
        return item, position, (parameter * 2).requires_grad

    found = list(DevicePool([torch.device("cpu")] * count).map(work, iter(range(7))))
    assert found == [(item, item % count, False) for item in range(7)]


def test_devices_work_at_the_same_time() -> None:
    barrier = threading.Barrier(2, timeout=30)  # one device alone would wait until the timeout

    def work(item: int, position: int) -> int:
        barrier.wait()
        return item

    assert list(DevicePool([torch.device("cpu")] * 2).map(work, [5, 6])) == [5, 6]


def test_an_error_on_a_device_is_raised() -> None:
    def work(item: int, position: int) -> int:
        raise MemoryError(f"position {position}")

    with pytest.raises(MemoryError, match="position 0"):
        list(DevicePool([torch.device("cpu")] * 2).map(work, [5, 6]))


def test_a_list_of_names_is_parsed() -> None:
    assert DevicePool.parse("cpu, cpu").devices == [torch.device("cpu")] * 2
    with pytest.raises(CalibrationError, match="`device`: 'nowhere' cannot be used on this machine"):
        DevicePool.parse("cpu,nowhere")
