# SPDX-License-Identifier: Apache-2.0
"""The random models of the end-to-end benchmark are checkpoints like any other."""

from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks import random_model
from benchmarks.shapes import Model
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.verify import check_headers

SMALL = Model("small", hidden=192, intermediate=512, heads=4, kv_heads=2, head_dim=64)


@pytest.mark.parametrize(("recipe", "w4a4", "w8a8"), [("tutorial", 5, 1), ("all-w4a4", 7, 0)])
def test_quantized_models_are_valid(tmp_path: Path, recipe: str, w4a4: int, w8a8: int) -> None:
    random_model.make(tmp_path / "model", SMALL, 2, recipe)
    reader = CheckpointReader(tmp_path / "model")
    check_headers(reader)
    types = [kind for name, kind in reader.description.tensors.items() if name.endswith("_proj.weight")]
    assert types.count(QuantType.W4A4_FLATQUANT_DYNAMIC) == 2 * w4a4
    assert types.count(QuantType.W8A8_DYNAMIC) == 2 * w8a8


def test_bytes_of_a_step_are_those_of_the_files(tmp_path: Path) -> None:
    random_model.make(tmp_path / "model", SMALL, 2, "float")
    stored = 0
    for shard in (tmp_path / "model").glob("*.safetensors"):
        with safe_open(shard, framework="pt") as opened:
            tensors = [opened.get_tensor(name) for name in opened.keys() if "norm" not in name]  # noqa: SIM118
        stored += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert random_model.step_bytes(SMALL, 2, "float", 2) == stored
