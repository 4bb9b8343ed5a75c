# SPDX-License-Identifier: Apache-2.0
"""Write the pages of docs/reference that are made from the code: python tools/reference_pages.py [--check]."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from itertools import groupby
from pathlib import Path
from unittest.mock import patch

from vllm_w4a4_plugin import cli
from vllm_w4a4_plugin.catalogue import entries

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
MADE = "Made by `python tools/reference_pages.py` from {source}; do not edit."


def errors() -> str:
    """errors.md: every entry of the catalogue."""
    lines = [
        "# Messages",
        "",
        "What each error and warning of the plugin means, and what to do. `…` stands for what varies.",
        "`vllm-w4a4 explain TEXT` finds the entry of a message; with `-` it reads a log from standard input.",
        MADE.format(source="`vllm_w4a4_plugin/catalogue`"),
    ]
    for section, group in groupby(entries(), lambda entry: entry.section):
        lines += ["", f"## {section}"]
        for entry in group:
            lines += ["", f"### {entry.code}", ""]
            lines += [f"> {_escaped(message)}" + "  " * (message != entry.messages[-1]) for message in entry.messages]
            lines += ["", f"{_escaped(entry.cause)}", "", f"**Remedy.** {_escaped(entry.remedy)}"]
    return "\n".join(lines) + "\n"


def command_line() -> str:
    """command-line.md: the help of every command."""
    lines = [
        "# Command line",
        "",
        MADE.format(source="the parsers"),
        "",
        "    " + "\n    ".join(_help([]).splitlines()),
    ]
    for name in cli.COMMANDS:
        lines += ["", f"## vllm-w4a4 {name}", "", "```", _help([name]).rstrip(), "```"]
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {"errors.md": errors, "command-line.md": command_line}


def stale() -> Iterator[str]:
    """Names of the pages that are not what the code would write."""
    for name, make in PAGES.items():
        file = REFERENCE / name
        if not file.exists() or file.read_text(encoding="utf-8") != make():
            yield name


def _help(command: list[str]) -> str:
    output = io.StringIO()
    # argparse breaks lines by the width of the terminal, and colours them from Python 3.14 on.
    with patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"), redirect_stdout(output), suppress(SystemExit):
        cli.main([*command, "--help"])
    return output.getvalue()


def _escaped(text: str) -> str:
    """Markdown that shows the text as it is; code in backquotes stays code."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        for character in "\\*_[]<>":
            parts[i] = parts[i].replace(character, f"\\{character}")
    return "`".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say which pages are not up to date")
    args = parser.parse_args()
    if args.check:
        sys.exit("\n".join(f"docs/reference/{name} is not up to date" for name in stale()) or 0)
    for name, make in PAGES.items():
        (REFERENCE / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
