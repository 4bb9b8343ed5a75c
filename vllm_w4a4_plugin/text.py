# SPDX-License-Identifier: Apache-2.0
"""Text output shared by the start-up log, errors and the command line."""

from collections.abc import Iterable, Sequence


def printable(text: str) -> str:
    """`text` without characters that a terminal or a log would obey, or that cannot be encoded.

    Control characters, bidirectional overrides, lone surrogates and the like become escapes such as \\x1b. Line breaks
    stay.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned text columns with a header; columns that are empty in every row are left out."""
    body = [list(row) for row in rows]
    kept = [i for i in range(len(header)) if any(row[i] for row in body)]
    lines = [[header[i] for i in kept], *([row[i] for i in kept] for row in body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])
