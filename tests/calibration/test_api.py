# SPDX-License-Identifier: Apache-2.0
"""Quantization as one call in Python, on tiny models."""

import json
import logging
import random
import string
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.calibration.running import bytes_of
from vllm_w4a4_plugin import calibration
from vllm_w4a4_plugin.calibration import CalibrationError, QuantizeOptions, Report
from vllm_w4a4_plugin.calibration.progress import Phase, Progress
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings
from vllm_w4a4_plugin.cli import main


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file, characters = tmp_path / "text.json", string.ascii_letters + string.digits + string.punctuation + " " * 20
    file.write_text(json.dumps(["".join(random.Random(k).choices(characters, k=600)) for k in range(4)]))
    return file


def test_the_report_says_what_was_written(float_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(calib_file=text, recipe="all-w4a4", keep_float=("model.layers.0.*",), distill=2)
    report = calibration.quantize(float_model("qwen3"), tmp_path / "out", options)
    assert isinstance(report, Report)
    reader = CheckpointReader(report.output)
    assert [*header_findings(reader), *value_findings(reader)] == []
    assert report.nbytes == sum(tensor.nbytes for tensor in reader.tensors.values())
    source = CheckpointReader(float_model("qwen3")).tensors.values()
    assert report.float_nbytes == sum(tensor.nbytes for tensor in source)
    assert [block.name for block in report.blocks] == ["model.layers.0", "model.layers.1"]
    for layer in report.layers:
        assert layer.quant_type == reader.description.tensors[f"{layer.name}.weight"]
        assert layer.shape == list(reader.tensors[f"{layer.name}.weight"].shape)
    assert [layer.quant_type for layer in report.layers] == [QuantType.FLOAT] * 7 + [
        QuantType.W4A4_FLATQUANT_DYNAMIC
    ] * 7
    clip = next(layer.clip for layer in report.layers if layer.name == "model.layers.1.mlp.down_proj")
    assert clip == reader.load("model.layers.1.mlp.down_proj.clip_ratio").item()


def test_it_is_the_command(float_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    directory = float_model("llama")
    options = QuantizeOptions(calib_file=text, recipe="w4a4-w8a8", seed=5, distill=1, gradients=True, seq_len=100)
    calibration.quantize(directory, tmp_path / "library", options)
    command = ["quantize", str(directory), "--output", str(tmp_path / "command"), "--calib-file", str(text)]
    arguments = ["--recipe", "w4a4-w8a8", "--seed", "5", "--distill", "1", "--gradients", "--seq-len", "100"]
    assert main([*command, *arguments]) == 0
    library, command_line = (bytes_of(tmp_path / name) for name in ("library", "command"))
    for files in (library, command_line):
        assert files.pop("quantization_report.html")  # says how long it took
    assert library == command_line


def test_without_text_the_model_generates_it_and_every_phase_is_reported(
    float_model: Callable[..., Path], tmp_path: Path
) -> None:
    heard: dict[Phase, list[Progress]] = {}
    options = QuantizeOptions(calib_tokens=1024, seq_len=32, gradients=True, distill=2)
    listener: Callable[[Progress], None] = lambda progress: heard.setdefault(progress.phase, []).append(progress)  # noqa: E731
    calibration.quantize(float_model("llama"), tmp_path / "out", options, listener)
    assert list(heard) == list(Phase)
    for steps in heard.values():
        assert [step.done for step in steps] == sorted(step.done for step in steps)
        assert steps[-1].done == steps[-1].total
    assert heard[Phase.GENERATING_TEXT][-1].total == 1024
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_needs_and_notes_are_logged_before_the_run(
    float_model: Callable[..., Path], text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="vllm_w4a4_plugin.calibration")
    options = QuantizeOptions(calib_file=text, recipe="all-w4a4", distill=0)

    def stop(progress: Progress) -> None:
        if progress.phase is Phase.QUANTIZING:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration.quantize(float_model("llama"), tmp_path / "out", options, stop)
    (needs, note) = caplog.records
    assert needs.levelno == logging.INFO
    assert "2 blocks; needs about" in needs.getMessage()
    assert note.levelno == logging.WARNING
    assert "o layers of type W4A4_FLATQUANT_DYNAMIC will run as matmul" in note.getMessage()
    with pytest.raises(CalibrationError, match="Continue it with `resume`"):
        calibration.quantize(float_model("llama"), tmp_path / "out", options)
    resumed = options.model_copy(update={"resume": True})
    assert calibration.quantize(float_model("llama"), tmp_path / "out", resumed).output == tmp_path / "out"


def test_a_checkpoint_of_another_model_is_refused_before_text_is_generated(
    float_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    calibration.quantize(float_model("llama"), start, QuantizeOptions(calib_file=text, distill=0))
    text.unlink()
    other = float_model("llama", initializer_range=0.05)
    with pytest.raises(CalibrationError, match="made from"):
        calibration.quantize(other, tmp_path / "out", QuantizeOptions(start_from=start, distill=1))
    assert [file.name for file in tmp_path.iterdir()] == ["start"]


def test_a_disk_that_is_too_small_is_refused(
    float_model: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_w4a4_plugin.calibration.run.preparation.free_disk", lambda place: 1000)
    with pytest.raises(CalibrationError, match="1e-06 GB of disk space are free"):
        calibration.quantize(float_model("llama"), tmp_path / "out", QuantizeOptions(calib_file=text))
    assert [file.name for file in tmp_path.iterdir()] == ["text.json"]
