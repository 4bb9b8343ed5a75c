# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 explain TEXT`: what a message of the plugin means, and what to do."""

import argparse
import sys

from vllm_w4a4_plugin.catalogue import find
from vllm_w4a4_plugin.text import printable

MOST = 10
"""Messages that are explained of a long text."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command's arguments."""
    parser = subparsers.add_parser("explain", help="explain a message of the plugin, or those in a log")
    parser.add_argument(
        "text", nargs="+", help="a message, a part of one, or a code; - reads a log from standard input"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print cause and remedy of each message; returns 1 if the text has none."""
    text = " ".join(args.text)
    if text == "-":
        text = sys.stdin.read()
    found = find(text)
    if not found:
        print("No message of this plugin is in this text. It may be one of vLLM, torch or the operating system.")
        return 1
    for entry in found[:MOST]:
        print(printable(f"{entry.code}: {entry.messages[0]}\n  cause:  {entry.cause}\n  remedy: {entry.remedy}"))
    if found[MOST:]:
        print(f"and {len(found) - MOST} more")
    return 0
