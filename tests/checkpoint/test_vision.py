# SPDX-License-Identifier: Apache-2.0
"""Vision-language checkpoints, with and without entries for the vision tower, in the commands that read checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import DESCRIPTION
from tests.vision import MODELS, write_model
from vllm_w4a4_plugin.cli import main

pytestmark = [pytest.mark.parametrize("name", MODELS), pytest.mark.parametrize("described", [True, False])]


def remove_tower(directory: Path) -> int:
    """Remove the vision tower from a checkpoint; returns how many values it had."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tower = {name: tensor for name, tensor in tensors.items() if "visual." in name}
    save_file({name: tensor for name, tensor in tensors.items() if name not in tower}, file, {"format": "pt"})
    description = json.loads((directory / DESCRIPTION).read_text())
    (directory / DESCRIPTION).write_text(json.dumps({k: v for k, v in description.items() if k not in tower}))
    return sum(tensor.numel() for tensor in tower.values())


def doctor(directory: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["doctor", str(directory), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_verify_finds_nothing(name: str, described: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(name, tmp_path, described)
    assert main(["verify", str(tmp_path)]) == 0, capsys.readouterr().out


def test_inspect_lists_the_tower(
    name: str, described: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(name, tmp_path, described)
    assert main(["inspect", "--json", str(tmp_path)]) == 0
    layers = json.loads(capsys.readouterr().out)["linear_layers"]
    # Two blocks with attention and MLP, and a merger; Qwen3-VL has another merger instead of the MLPs' gates.
    assert [layer["quant_type"] for layer in layers if "visual." in layer["name"]] == ["FLOAT"] * 12


def test_doctor_counts_the_tower_in_memory_only(
    name: str, described: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(name, tmp_path, described)
    whole = doctor(tmp_path, capsys)
    values = remove_tower(tmp_path)
    text = doctor(tmp_path, capsys)
    assert values > 100_000
    assert whole["memory"]["total_weights"] - text["memory"]["total_weights"] == 2 * values
    # A token that is no image's does not pass the tower.
    assert [step["linears"] for step in whole["steps"]] == pytest.approx([step["linears"] for step in text["steps"]])
