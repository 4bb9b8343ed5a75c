# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 quantize` from the command line, on a tiny model."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.calibration.conftest import _one_thread, float_model  # noqa: F401 - fixtures
from vllm_w4a4_plugin.calibration.block.quantizer import BlockQuantizer
from vllm_w4a4_plugin.calibration.run import preparation
from vllm_w4a4_plugin.calibration.run.work import WorkDirectory
from vllm_w4a4_plugin.cli import main

OPEN = {"meta", "path", "polyline"}


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.json"
    file.write_text(json.dumps(["The quick brown fox jumps over the lazy dog. " * 40] * 4))
    return file


def test_official_flags_report_and_verify(
    float_model: Callable[..., Path],  # noqa: F811
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory, output = float_model("qwen3"), tmp_path / "out"
    command = ["quantize", "--model_path", str(directory), "--save_directory", str(output), "--calib_file", str(text)]
    assert main([*command, "--trust_remote_code", "True", "--batch_size", "1"]) == 0  # as the tutorial writes it
    shown = capsys.readouterr()
    assert "needs about" in shown.err
    assert "model.layers.1.mlp.up_proj" in shown.out
    assert main(["verify", str(output)]) == 0

    page = (output / "quantization_report.html").read_text()
    assert "http" not in page
    stack: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in OPEN:
                stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert stack.pop() == tag

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            assert tag in OPEN | {"br"}

    Checker().feed(page.replace("<br>", "<br/>"))
    assert stack == []
    assert page.count("<polyline") >= 1 + 2 * 2 * 2


def test_without_a_file_the_model_generates_the_text(float_model: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    outputs = [tmp_path / "a", tmp_path / "b"]
    for output in outputs:
        command = ["quantize", str(float_model("llama")), "--output", str(output)]
        assert main([*command, "--calib-tokens", "1024", "--seq-len", "32"]) == 0
    name = "quant_model_weight_w4a4_flatquant_dynamic-00001-of-00001.safetensors"
    assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calib-file", "missing.json"], "missing.json: no such file"),
        (["--recipe", "w3a3"], "unknown recipe 'w3a3'"),
        (["--keep-float", "*.qproj"], "matches no linear layer"),
        (["--device", "cpu,nowhere"], "'nowhere' cannot be used on this machine"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[str],
    message: str,
    float_model: Callable[..., Path],  # noqa: F811
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["quantize", str(float_model("llama")), "--output", str(tmp_path / "out"), "--calib-file", str(text)]
    assert main([*command, *arguments]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert {file.name for file in tmp_path.iterdir()} == {"text.json"}


def test_a_killed_process_is_resumed(
    float_model: Callable[..., Path],  # noqa: F811
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """kill -9 in the middle of the second block, then --resume."""
    script = (
        "import os, signal, sys\n"
        "from vllm_w4a4_plugin.calibration.block import guard\n"
        "from vllm_w4a4_plugin.cli import main\n"
        "original = guard.quantize_group\n"
        "def quantize(block, group, inputs, plan):\n"
        "    if block.index == 1 and group.role == 'gate_up':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(block, group, inputs, plan)\n"
        "guard.quantize_group = quantize\n"
        "main(sys.argv[1:])\n"
    )
    output = tmp_path / "out"
    command = ["quantize", str(float_model("mistral")), "--output", str(output), "--calib-file", str(text)]
    killed = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    assert main(command) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert main(["verify", str(output)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"text.json", "out"}


@pytest.mark.parametrize("limit", [2_000, 60_000, 400_000])
def test_writes_that_fail_leave_no_checkpoint_and_can_be_resumed(
    limit: int,
    float_model: Callable[..., Path],  # noqa: F811
    text: Path,
    tmp_path: Path,
) -> None:
    """The system refuses to let files grow beyond a limit, as it does on a full disk, in different places of a run."""
    script = (
        "import resource, sys\n"
        "from vllm_w4a4_plugin.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    output = tmp_path / "out"
    command = ["quantize", str(float_model("llama")), "--output", str(output), "--calib-file", str(text)]
    refused = subprocess.run(
        [sys.executable, "-c", script, str(limit), *command], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1, refused.stderr
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("vllm-w4a4: ")
    assert "cannot be written" in last
    assert "File too large" in last
    assert not output.exists()
    assert main([*command, "--resume"]) == 0
    assert main(["verify", str(output)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"text.json", "out"}


def test_interrupt_says_how_to_go_on(
    float_model: Callable[..., Path],  # noqa: F811
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BlockQuantizer, "run", interrupted)
    command = ["quantize", str(float_model("mistral")), "--output", str(tmp_path / "out"), "--calib-file", str(text)]
    assert main(command) == 130
    assert "--resume" in capsys.readouterr().out


def test_generated_text_is_kept_for_a_resumed_run(
    float_model: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    command = ["quantize", str(float_model("llama")), "--output", str(output), "--calib-tokens", "1024"]
    with monkeypatch.context() as patch:
        patch.setattr(BlockQuantizer, "run", interrupted)
        assert main(command) == 130
    monkeypatch.setattr(preparation, "generate_text", interrupted)
    assert main([*command, "--resume"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"out"}


def test_text_that_another_model_generated_is_not_used(
    float_model: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # After the text is written, before the file that identifies the run.
    monkeypatch.setattr(WorkDirectory, "open", interrupted)
    rest = ["--output", str(tmp_path / "out"), "--calib-tokens", "1024"]
    assert main(["quantize", str(float_model("llama")), *rest]) == 130
    asked: list[Path] = []

    def generate(directory: Path, *_: object) -> None:
        asked.append(directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "generate_text", generate)
    assert main(["quantize", str(float_model("mistral")), *rest]) == 130
    assert asked == [float_model("mistral")]


def test_what_cannot_be_quantized_leaves_nothing_behind(
    float_model: Callable[..., Path],  # noqa: F811
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = text.rename(tmp_path / "calibration.json")
    unsupported = float_model("gpt2", bos_token_id=0, eos_token_id=2)
    foreign_tokenizer = float_model("llama", vocab_size=64)
    for directory, message in [
        (unsupported, "docs/reference/families.md lists the models that can be quantized"),
        (foreign_tokenizer, "belong to another model"),
    ]:
        command = ["quantize", str(directory), "--output", str(tmp_path / "out"), "--calib-file", str(text)]
        assert main(command) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error
        assert str(directory) in error
        assert [file.name for file in tmp_path.iterdir()] == ["calibration.json"]
