# SPDX-License-Identifier: Apache-2.0
"""What each message of the package means, and what to do: the tables in this directory, one entry per kind of message.

    [code]
    message = "literal text of the message, … for what varies"      # or messages = [several]
    cause = "why it appears"
    remedy = "what to do"

`vllm-w4a4 explain` and docs/reference/errors.md show them. tests/test_catalogue.py finds messages without an entry.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

GAP = "…"
"""In a message, what varies."""


@dataclass(frozen=True)
class Entry:
    """One kind of message.

    Attributes:
        code: its short name.
        messages: texts that appear in such messages, and in no others.
        cause, remedy: one or two sentences each.
        section: title of the table that has it.
    """

    code: str
    messages: tuple[str, ...]
    cause: str
    remedy: str
    section: str

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """Regular expressions of `messages`."""
        return tuple(re.compile(".*?".join(map(re.escape, message.split(GAP)))) for message in self.messages)


def entries() -> Iterator[Entry]:
    """Every entry, in the order of the tables."""
    for file in sorted(Path(__file__).parent.glob("*.toml")):
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        title = table.pop("title")
        for code, fields in table.items():
            messages = fields.get("messages") or [fields["message"]]
            yield Entry(code, tuple(messages), fields["cause"], fields["remedy"], title)


def find(text: str) -> list[Entry]:
    """The entries of a code, or of the messages in a text such as a log, in the order of the text.

    Where the messages of two entries overlap, the one whose message is longer is meant.
    """
    known = list(entries())
    if exact := [entry for entry in known if entry.code == text.strip()]:
        return exact
    hits = [
        (len(message.replace(GAP, "")), match.start(), match.end(), entry)
        for entry in known
        for message, pattern in zip(entry.messages, entry.patterns, strict=True)
        for match in pattern.finditer(text)
    ]
    chosen: list[tuple[int, int, int, Entry]] = []
    for hit in sorted(hits, key=lambda hit: -hit[0]):
        if all(hit[2] <= other[1] or other[2] <= hit[1] for other in chosen):
            chosen.append(hit)
    ordered = [entry for _, _, _, entry in sorted(chosen, key=lambda hit: hit[1])]
    return list(dict.fromkeys(ordered))
