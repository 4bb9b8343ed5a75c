# SPDX-License-Identifier: Apache-2.0
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import MICRO
from vllm_w4a4_plugin.cli import main


def test_verify_a_good_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(MICRO)]) == 0
    assert capsys.readouterr().out.endswith("good\n")


def test_verify_prints_every_finding(
    micro_copy: Path, edit_tensors: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    clips = {f"model.layers.{i}.self_attn.q_proj.clip_ratio": torch.tensor([2.0]) for i in range(2)}
    edit_tensors(clips)
    assert main(["verify", str(micro_copy)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("expected a clip ratio" in line for line in lines) == 2
    assert lines[-1].endswith("4 findings")  # each clip also disagrees with those of k and v


def test_a_missing_directory_is_an_error_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "no/such/dir"]) == 1
    assert "no/such/dir: not a directory" in capsys.readouterr().err


def test_inspect_shows_each_kind_of_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(MICRO)]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("q_proj"))
    assert row.split() == ["q_proj", "W4A4_FLATQUANT_DYNAMIC", "256", "x", "192", "12", "x", "16", "1", "2"]
    assert "79 tensors in 1 files" in out


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(MICRO), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["total_bytes"] == 1319976
    assert {layer["quant_type"] for layer in data["linear_layers"]} == {
        "FLOAT",
        "W8A8_DYNAMIC",
        "W4A4_FLATQUANT_DYNAMIC",
    }
