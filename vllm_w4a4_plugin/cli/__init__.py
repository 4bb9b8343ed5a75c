# SPDX-License-Identifier: Apache-2.0
"""The `vllm-w4a4` command."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.constants import VERSION

from .log_files import calm_in_logs
from .output import guarded_stdout

COMMANDS = ("inspect", "verify", "quantize", "convert", "eval", "doctor", "explain")
"""Modules of this package; each has `add_parser(subparsers)`, which sets `func(args) -> exit code`."""

INTERRUPTED = 130
"""Exit code of a command that was stopped by Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    calm_in_logs()
    with guarded_stdout() as output:
        try:
            code = _run(argv)
        except SystemExit as end:  # of --help, --version or wrong arguments
            if not output.failed():
                raise
            code = end.code if isinstance(end.code, int) else 1
        if output.failed():
            print(f"vllm-w4a4: standard output cannot be written: {output.error}", file=sys.stderr)
            return code or 1
        return code


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="vllm-w4a4", description="Tools for W4A4 FlatQuant checkpoints.")
    parser.add_argument("--version", action="version", version=f"vllm-w4a4-plugin {VERSION}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"{__name__}.{name}").add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.func(args)
    except CheckpointError as error:
        print(f"vllm-w4a4: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nvllm-w4a4: {args.func.__module__.rpartition('.')[2]} interrupted", file=sys.stderr)
        return INTERRUPTED
