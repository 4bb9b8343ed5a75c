# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 quantize MODEL --output DIR`: a float Hugging Face model becomes a W4A4 FlatQuant checkpoint."""

import argparse
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_w4a4_plugin import calibration
from vllm_w4a4_plugin.calibration.errors import CalibrationError
from vllm_w4a4_plugin.calibration.options import DEFAULT_RECIPE, QuantizeOptions
from vllm_w4a4_plugin.text import format_table

from .progress import ProgressDisplay

if TYPE_CHECKING:
    from vllm_w4a4_plugin.calibration.progress import Progress


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command's arguments. Options that are not given keep the defaults of `QuantizeOptions`."""
    parser = subparsers.add_parser(
        "quantize", help="make a W4A4 checkpoint from a float Hugging Face model", argument_default=argparse.SUPPRESS
    )
    # The second spelling of an argument is that of msModelSlim's script, so that its command lines work here.
    parser.add_argument("model", nargs="?", default=None, type=Path, help="directory of the float model")
    parser.add_argument("--model_path", default=None, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", "--save_directory", type=Path, required=True, help="directory to make")
    parser.add_argument(
        "--calib-file", "--calib_file", type=Path,
        help="calibration text: .json (array of strings), .jsonl or .txt; without it, the model generates text",
    )  # fmt: skip
    parser.add_argument(
        "--recipe",
        help=f"tutorial, w4a4-w8a8, all-w4a4, w4a8, w4a4-dynamic or a .yaml file (default: {DEFAULT_RECIPE})",
    )
    parser.add_argument(
        "--keep-float", action="append", metavar="PATTERN",
        help="do not quantize layers whose full name matches, e.g. 'model.layers.0.*'; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--head", choices=("FLOAT", "W8A8_DYNAMIC"),
        help="quant type of the output head of a model that does not tie it to the embedding (default: FLOAT, or that "
        "of --start-from)",
    )  # fmt: skip
    parser.add_argument(
        "--start-from", type=Path, metavar="DIR",
        help="a checkpoint made from MODEL, here or by msModelSlim: only distil it",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help=f"seed of rotations and generated text (default: {_default('seed')})")
    parser.add_argument(
        "--device",
        help="cpu, cuda, npu, cuda:1, ...; several, separated by commas, share the work "
        f"(default: {_default('device')})",
    )
    parser.add_argument(
        "--calib-tokens", type=int, help=f"use at most this many tokens (default: {_default('calib_tokens')})"
    )
    parser.add_argument(
        "--seq-len", type=int,
        help=f"tokens per row; text that the model generates has at most 256 (default: {_default('seq_len')})",
    )  # fmt: skip
    parser.add_argument(
        "--gradients", action="store_true",
        help="weigh tokens by the squared gradient of the loss, which costs one more forward and backward pass; "
        "measure before you use it",
    )  # fmt: skip
    parser.add_argument(
        "--distill", type=int, metavar="STEPS",
        help="train scales, clips, norms and transforms towards the float model's predictions, on at most 256 tokens "
        "of calibration text per step; the whole model must fit into memory in float32 (default: 16 for models with "
        "fewer than 300 million parameters, 0 for larger ones)",
    )  # fmt: skip
    parser.add_argument(
        "--activations-on-disk", action="store_true",
        help="keep the activations of one block in files next to the output instead of in memory",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run at its last finished block")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own Python code")
    parser.add_argument("--trust_remote_code", nargs="?", const=True, type=_truth, help=argparse.SUPPRESS)
    parser.add_argument("--batch_size", type=int, help=argparse.SUPPRESS)  # msModelSlim's; has no effect here
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Quantize; returns 0."""
    given = {name: value for name, value in vars(args).items() if name in QuantizeOptions.model_fields}
    model = args.model or args.model_path
    if model is None:
        raise CalibrationError("give the directory of the float model: vllm-w4a4 quantize MODEL --output DIR")
    with _options_as_flags(), _log_to_stderr(), ProgressDisplay(" steps", keeps=True) as display:

        def show(progress: "Progress") -> None:
            display.show(progress.phase, progress.done, progress.total, progress.detail)

        try:
            report = calibration.quantize(model, args.output, QuantizeOptions(**given), show)
        except KeyboardInterrupt:
            print(f"\n{display}; the same command with --resume continues.")
            raise
    _print(report)
    return 0


def _print(report: "calibration.Report") -> None:
    from vllm_w4a4_plugin.calibration.run.report import LAYER_HEADER, REPORT_FILE, layer_row

    print(format_table(LAYER_HEADER, map(layer_row, report.layers)))
    print(
        f"\n{report.output}: {report.nbytes / 1e6:.1f} MB in {report.seconds:.0f} s; {REPORT_FILE} shows the details."
    )
    print(f"Serve it: vllm serve {report.output} --quantization ascend")


def _default(option: str) -> Any:
    return QuantizeOptions.model_fields[option].default


def _truth(value: str) -> bool:
    """The value of msModelSlim's `--trust_remote_code True`."""
    if value.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {value!r}")
    return value.lower() == "true"


@contextmanager
def _options_as_flags() -> Iterator[None]:
    """Context in which errors name options as the command line spells them."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(_with_flags(str(error))) from None


def _with_flags(message: str) -> str:
    """A message of the library with `calib_file` written as --calib-file."""

    def flag(match: re.Match[str]) -> str:
        name = match[1]
        return f"--{name.replace('_', '-')}" if name in QuantizeOptions.model_fields else match[0]

    return re.sub(r"`(\w+)`", flag, message)


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(_with_flags(record.getMessage()), file=sys.stderr)


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Context in which the log messages of the library are printed as plain text."""
    logger, handler = logging.getLogger(calibration.__name__), _StderrHandler()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
