# SPDX-License-Identifier: Apache-2.0
"""Weights that are packed two to a byte on disk load into the same NPU parameters as unpacked ones."""

from pathlib import Path

import torch

from tests.conftest import MICRO
from tests.engine.packed_cases import write_packed
from tests.npu.loading import loaded_model
from tests.npu.micro import assert_layers_compute


def test_packed_weights(tmp_path: Path) -> None:
    write_packed(MICRO, tmp_path / "packed")
    with loaded_model(MICRO) as model:
        expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with loaded_model(tmp_path / "packed") as model:
        assert_layers_compute(model, MICRO)
        found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
