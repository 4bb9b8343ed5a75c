# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 convert DIR --output DIR`: the same checkpoint packed or not, with other names or other shards."""

import argparse
import re
from functools import partial
from pathlib import Path

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.convert import NAMINGS, Form, convert

from .progress import ProgressDisplay

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command's arguments."""
    parser = subparsers.add_parser(
        "convert",
        help="store a checkpoint in another form: int4 packed two to a byte or not, other names, other shards",
    )
    parser.add_argument("directory", type=Path, help="checkpoint directory")
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    packing = parser.add_mutually_exclusive_group()
    packing.add_argument(
        "--pack", dest="packed", action="store_true", default=None, help="two int4 values to a byte: half the size"
    )
    packing.add_argument(
        "--unpack", dest="packed", action="store_false", help="one int4 value to a byte, as msModelSlim writes W4A4"
    )
    parser.add_argument(
        "--naming",
        choices=NAMINGS,
        help="names of the weight files: v0 for quant_model_weight_<type>-..., v1 for quant_model_weights-... "
        "(default: as they are)",
    )
    parser.add_argument(
        "--shard-size",
        type=size,
        metavar="SIZE",
        help="most data in one file, such as 4GB (default: files as they are)",
    )
    parser.add_argument(
        "--float", type=Path, metavar="MODEL",
        help="DIR holds flat_matrices.pth of the FlatQuant repository, made from this float model: write msModelSlim's "
        "form",
    )  # fmt: skip
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Convert and print what changed; returns 0."""
    if args.float is not None:
        return _convert_matrices(args)
    if args.packed is None and args.naming is None and args.shard_size is None:
        raise CheckpointError("convert needs something to do: --pack, --unpack, --naming or --shard-size.")
    with ProgressDisplay() as progress:
        form = Form(args.packed, args.naming, args.shard_size)
        result = convert(args.directory, args.output, form, partial(progress.show, "Writing"))
    if args.packed is not None:
        print(f"{result.weights} weights {'packed' if args.packed else 'unpacked'}")
    for name in result.unpackable:
        print(f"{name} has an odd number of rows and stays unpacked")
    print(
        f"{args.output}: {result.bytes_after:,} bytes in {result.files} file{'s' if result.files != 1 else ''} "
        f"(before: {result.bytes_before:,})"
    )
    return 0


def _convert_matrices(args: argparse.Namespace) -> int:
    from vllm_w4a4_plugin.calibration.flatquant_repository import convert_matrices

    if args.packed is not None or args.naming is not None or args.shard_size is not None:
        raise CheckpointError(
            "--float cannot be combined with --pack, --unpack, --naming or --shard-size; convert twice."
        )
    with ProgressDisplay(" layers") as progress:
        merged = convert_matrices(args.directory, args.float, args.output, partial(progress.show, "Converting"))
    print(f"{args.output}: {merged.layers} layers")
    if merged.layer:
        print(
            f"Layers that run as one product share one clip ratio: the mean differs from their own by at most "
            f"{100 * merged.deviation:.2f} % ({merged.layer})."
        )
    return 0


def size(text: str) -> int:
    """Bytes of a size such as 500MB, 4GB or 4000000000.

    Raises:
        argparse.ArgumentTypeError: the text is no size, or 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]?)b?", text.strip().lower())
    value = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 4GB, found {text!r}")
    return value
