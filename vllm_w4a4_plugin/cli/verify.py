# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 verify DIR`: every check that a checkpoint must pass before it is served."""

import argparse

from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.checkpoint.verify import header_findings, remarks, value_findings

from .bars import bar


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command's arguments."""
    parser = subparsers.add_parser("verify", help="check a checkpoint; exit code 0 if it is good, else 1")
    parser.add_argument("directory", help="checkpoint directory")
    parser.add_argument("--headers-only", action="store_true", help="do not read the tensors' values")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print one line per finding; returns 0 if there are none, else 1."""
    reader = CheckpointReader(args.directory)
    findings = list(header_findings(reader))
    if not findings and not args.headers_only:
        with bar(desc="Checking values", unit=" tensors", leave=False) as checked:
            findings = list(value_findings(reader, checked.update))
    for finding in findings:
        print(finding)
    count = len(findings)
    if findings:
        print(f"{args.directory}: {count} finding{'s' if count != 1 else ''}")
        return 1
    for remark in remarks(reader):
        print(f"Remark: {remark}.")
    print(f"{args.directory}: good")
    return 0
