# SPDX-License-Identifier: Apache-2.0
"""Tensors in memory-mapped files."""

from pathlib import Path

import pytest
import torch

from vllm_w4a4_plugin.calibration.activations import Activations


def test_files_have_no_names_and_are_large_enough(tmp_path: Path) -> None:
    tensor = Activations(tmp_path).empty(30, 7)
    tensor.copy_(torch.arange(210.0).view(30, 7))
    assert tensor.sum() == 209 * 105
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_not_a_signal() -> None:
    with pytest.raises(OSError, match=r"space|large"):
        Activations(Path("/dev/shm")).empty(2**42)
