# SPDX-License-Identifier: Apache-2.0
"""`inspect` shows everything that is there: what cannot be run, and what is damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cases import write_case
from tests.conftest import DESCRIPTION, MICRO
from vllm_w4a4_plugin.cli import main

O_PROJ = "model.layers.0.self_attn.o_proj"


def rows(text: str) -> dict[str, str]:
    """The last line of the table for each name in its first column."""
    return {line.split("  ")[0]: line for line in text.splitlines()}


def write_mixed(directory: Path) -> None:
    """A checkpoint with two layers of a type that is known by name only."""
    write_case("e1_static", directory)
    file = directory / DESCRIPTION
    file.write_text(file.read_text().replace('"W8A8"', '"W8A8_MIX"'))


def test_a_type_that_is_known_by_name_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mixed(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    row = rows(capsys.readouterr().out)["down_proj"]
    assert "W8A8_MIX  " in row
    assert "192 x 384" in row
    assert row.endswith("2       cannot be run on CPU; `vllm-w4a4 verify` says what can")


def test_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case("c1_moe_w4", tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    row = rows(capsys.readouterr().out)["experts' gate_proj"]
    assert "W4A4_DYNAMIC" in row
    assert "128 x 192" in row
    assert "  8  " in row
    assert "cannot be run" not in row


def test_unknown_type(micro_copy: Path, edit_json: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(DESCRIPTION, {f"{O_PROJ}.weight": "W5A5"})
    assert main(["inspect", str(micro_copy)]) == 1
    out = capsys.readouterr().out
    assert any("W5A5" in line and "unknown quant type 'W5A5'" in line for line in out.splitlines())
    assert "q_proj" in rows(out)


def test_it_goes_on_after_a_bad_layer(
    micro_copy: Path, edit_tensors: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensors({f"{O_PROJ}.weight_scale": torch.ones(7, 1)})
    assert main(["inspect", str(micro_copy)]) == 1
    out = capsys.readouterr().out
    bad = [line for line in out.splitlines() if "expected shape [192, 1]" in line]
    assert len(bad) == 1
    assert bad[0].split()[0] == "o_proj"
    assert "down_proj" in rows(out)
    assert main(["inspect", str(micro_copy), "--json"]) == 1
    layers = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["linear_layers"]}
    assert layers[O_PROJ]["is_faulty"]
    assert layers[O_PROJ]["out_features"] == 192
    assert "expected shape [192, 1]" in layers[O_PROJ]["problem"]
    assert len(layers) == 15
    assert not any(layer["problem"] for name, layer in layers.items() if name != O_PROJ)


def test_json_of_a_type_that_cannot_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mixed(tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    layers = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["linear_layers"]}
    down = layers["model.layers.0.mlp.down_proj"]
    assert (down["quant_type"], down["out_features"], down["in_features"]) == ("W8A8_MIX", 192, 384)
    assert "quant type W8A8_MIX cannot be run here" in down["problem"]


def test_without_config(micro_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (micro_copy / "config.json").unlink()
    assert main(["inspect", str(micro_copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architectures"] is None


def test_good_layers_have_no_remark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(MICRO)]) == 0
    assert "remark" not in capsys.readouterr().out
