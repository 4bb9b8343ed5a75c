# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


COMMANDS = [
    ["inspect", str(MICRO)],
    ["inspect", str(MICRO), "--json"],
    ["verify", str(MICRO)],
    ["doctor", str(MICRO)],
    ["quantize", "--help"],
    ["eval", "--help"],
    ["--version"],
]


def start(arguments: list[str], **streams: Any) -> subprocess.Popen[str]:
    script = "import sys; from vllm_w4a4_plugin.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True, **streams)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_full_disk_under_the_output_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        process = start(arguments, stdout=full)
        _, shown = process.communicate(timeout=100)
    assert process.returncode == 1
    assert shown.splitlines()[-1].endswith("vllm-w4a4: standard output cannot be written: No space left on device")
    assert "Traceback" not in shown
    assert "Exception" not in shown


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_reader_that_leaves_is_no_failure(arguments: list[str]) -> None:
    """As `| head -1` does, but before anything is written, which leaves nothing to chance."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start(arguments, stdout=writing)
    os.close(writing)
    _, shown = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "Traceback" not in shown
    assert "Exception" not in shown


def test_verify_says_bad_to_a_reader_that_leaves(micro_copy: Path, edit_tensors: Callable[..., None]) -> None:
    edit_tensors({"model.layers.0.self_attn.q_proj.clip_ratio": torch.tensor([2.0])})
    reading, writing = os.pipe()
    os.close(reading)
    process = start(["verify", str(micro_copy)], stdout=writing)
    os.close(writing)
    process.communicate(timeout=100)
    assert process.returncode == 1


def test_a_closed_output_is_no_failure() -> None:
    process = start(["inspect", str(MICRO)], stdout=None, preexec_fn=lambda: os.close(1))
    _, shown = process.communicate(timeout=100)
    assert (process.returncode, shown) == (0, "")


@pytest.mark.parametrize("command", ["eval", "quantize"])
def test_a_missing_text_is_called_missing(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--text"] if command == "eval" else ["--output", str(tmp_path / "out"), "--calib-file"]
    assert main([command, str(MICRO), *rest, str(tmp_path / "no.json")]) == 1
    assert capsys.readouterr().err == f"vllm-w4a4: {tmp_path / 'no.json'}: no such file.\n"
