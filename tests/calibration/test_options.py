# SPDX-License-Identifier: Apache-2.0
"""Ranges and combinations of options, and how errors name them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_w4a4_plugin.calibration import CalibrationError, QuantizeOptions
from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.cli import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 15}, "`seq_len`: input should be greater than or equal to 16, found 15"),
        ({"calib_tokens": 511}, "`calib_tokens`: input should be greater than or equal to 512, found 511"),
        ({"distill": -1}, "`distill`: input should be greater than or equal to 0, found -1"),
        ({"seed": -1}, "`seed`: input should be greater than or equal to 0, found -1"),
        ({"seed": 2**32}, "`seed`: input should be less than 4294967296"),
        ({"device": ""}, "`device`: string should have at least 1 character"),
        ({"gradients": "perhaps"}, "`gradients`: input should be a valid boolean"),
        ({"seq_length": 64}, "`seq_length` is not an option; there are calib_file, calib_tokens, seq_len"),
        ({"seq_len": 1, "seed": -1}, "`seq_len`: .*; `seed`: "),
        ({"start_from": "w4a4", "recipe": "tutorial"}, "leave out `recipe`, `keep_float` and `gradients`"),
        ({"start_from": "w4a4", "keep_float": ["*"]}, "leave out `recipe`, `keep_float` and `gradients`"),
        ({"start_from": "w4a4", "gradients": True}, "leave out `recipe`, `keep_float` and `gradients`"),
        ({"start_from": "w4a4", "distill": 0}, "set `distill` to a number of steps above 0"),
    ],
)
def test_errors_name_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        QuantizeOptions(**options)


def test_the_smallest_values_are_accepted() -> None:
    options = QuantizeOptions(seq_len=16, calib_tokens=512, distill=0, seed=0, calib_file="texts.json")
    assert options.calib_file == Path("texts.json")
    with pytest.raises(ValidationError):
        options.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-len", "4"], "--seq-len: input should be greater than or equal to 16, found 4."),
        (["--calib_file", "t.json", "--distill", "-2"], "--distill: input should be greater than or equal to 0"),
        (["--start-from", "w4a4", "--gradients"], "--start-from takes each layer as that checkpoint has it"),
    ],
)
def test_the_command_line_names_its_flags(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "model", "--output", str(tmp_path / "out"), *arguments]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"vllm-w4a4: {message}")
    assert "`" not in shown
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_error_is_a_checkpoint_error() -> None:
    assert issubclass(CalibrationError, CheckpointError)


def test_importing_the_package_and_its_options_is_light() -> None:
    code = (
        "import sys; from vllm_w4a4_plugin.calibration import CalibrationError, QuantizeOptions; "
        "import vllm_w4a4_plugin.calibration.recipe, vllm_w4a4_plugin.calibration.run.npu_notes; "
        "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
