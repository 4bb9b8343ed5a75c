#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Mutates the NPU kernels: leaves out every flag, barrier, guard and clamp, one at a time, confuses flags between cores
and swaps scale factors.

All mutants go into one copy of the sources, switched at run time by `mutation::active`, so that they are compiled once:

    flag, barrier   AscendC::SetFlag<E>(i);   ->  (mutation::is(7) ? void() : AscendC::SetFlag<E>(i));
    guard           if (rows > 0) {           ->  if (mutation::is(8) ? true : (rows > 0)) {
    early exit      if (passes == 0) return;  ->  if (mutation::is(9) ? false : (passes == 0)) return;
    clamp           Min(kChunk, left)         ->  (mutation::is(10) ? (kChunk) : Min(kChunk, left))
    formula         tiling_.scale_factor      ->  (mutation::is(11) ? tiling_.inverse_factor : tiling_.scale_factor)
    wrong id        CrossCoreWaitFlag(kA)     ->  CrossCoreWaitFlag((mutation::is(12) ? kB : kA))
    shared id       constexpr uint16_t kA = 0 ->  const mutation::Flag kA(0, {{13, 1}}), kB's id

`if constexpr` selects between kernels, so it is not a guard. Ids are confused with those that the same cores count.
"""

from __future__ import annotations

import argparse
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

SYNCHRONIZATION = re.compile(
    r"AscendC::(SetFlag|WaitFlag|CrossCoreSetFlag|CrossCoreWaitFlag|PipeBarrier|SyncAll)(<[^;()]*>)?(?=\()"
)
GUARD = re.compile(r"\bif \(")
CLAMP = re.compile(r"(?<![\w:])Min\(")
FORMULA = re.compile(r"\btiling_\.(scale_factor|inverse_factor)\b")
FLAG = re.compile(r"\bAscendC::CrossCore(?:Set|Wait)Flag(?:<[^;()]*>)?\((k\w+)\)")
FLAG_ID = re.compile(r"\binline constexpr uint16_t (k\w+) = (\d+)(?=;)")
COUNTED_BY = {
    "AIV": ("kTokensReady", "kGrid", "kSumsReady"),
    "AIC": ("kTokensFree", "kActivationsReady", "kSumsFree"),
}
"""The kernels' flags between cores, by the cores that wait for them."""
EARLY_EXIT = re.compile(r"\s*(return|continue|break)\b")


@dataclass(frozen=True)
class Mutant:
    """A place that is changed: its kind, where it is and its source text."""

    kind: str
    file: str
    line: int
    text: str


def confused_with(flag: str) -> list[str]:
    """The other flags that the same cores wait for."""
    for flags in COUNTED_BY.values():
        if flag in flags:
            return [other for other in flags if other != flag]
    raise ValueError(f"add the flag {flag} to COUNTED_BY")


def closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses after {text[opening : opening + 60]!r}")


def code_only(text: str) -> str:
    """`text` with comments and preprocessor lines blanked, positions unchanged."""
    return re.sub(r"//[^\n]*|^#[^\n]*", lambda match: " " * len(match.group()), text, flags=re.MULTILINE)


def first_argument(text: str) -> str:
    """The first argument of an argument list."""
    depth = 0
    for index, character in enumerate(text):
        depth += {"(": 1, "<": 0, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            return text[:index]
    raise ValueError(f"one argument only: {text!r}")


def mutate(text: str, file: str, mutants: list[Mutant]) -> str:
    """`text` with every mutation switched in; appends to `mutants`, whose number is the place in the list from 1."""
    code = code_only(text)
    insertions: list[tuple[int, int, str]] = []  # position, order among equals, text

    def add(kind: str, begin: int, end: int) -> int:
        line = text.count("\n", 0, begin) + 1
        mutants.append(Mutant(kind, file, line, " ".join(text[begin:end].split())))
        return len(mutants)

    for match in SYNCHRONIZATION.finditer(code):
        end = closing(code, match.end()) + 1
        if code[end] != ";":
            raise ValueError(f"{file}: expected a statement at {text[match.start() : end + 10]!r}")
        number = add(match.group(1), match.start(), end)
        insertions += [(match.start(), 0, f"(mutation::is({number}) ? void() : "), (end, 0, ")")]
    for match in GUARD.finditer(code):
        opening = match.end() - 1
        end = closing(code, opening)
        is_exit = EARLY_EXIT.match(code[end + 1 :]) is not None
        number = add("guard", match.start(), end + 1)
        forced = "false" if is_exit else "true"
        insertions += [(opening + 1, 0, f"mutation::is({number}) ? {forced} : ("), (end, 1, ")")]
    for match in CLAMP.finditer(code):
        end = closing(code, match.end() - 1)
        if code[: match.start()].endswith("inline uint32_t "):
            continue  # its definition
        number = add("clamp", match.start(), end + 1)
        first = first_argument(text[match.end() : end])
        insertions += [(match.start(), 1, f"(mutation::is({number}) ? ({first}) : "), (end + 1, -1, ")")]
    for match in FORMULA.finditer(code):
        number = add("formula", match.start(), match.end())
        other = "inverse_factor" if match.group(1) == "scale_factor" else "scale_factor"
        insertions += [(match.start(), 0, f"(mutation::is({number}) ? tiling_.{other} : "), (match.end(), 0, ")")]
    for match in FLAG.finditer(code):
        other_flags = "".join(
            f"mutation::is({add('wrong id', *match.span())}) ? {other} : " for other in confused_with(match.group(1))
        )
        insertions += [(match.start(1), 0, f"({other_flags}"), (match.end(1), -1, ")")]
    ids = {match.group(1): match for match in FLAG_ID.finditer(code)}
    for name, match in ids.items():
        later = [other for other in confused_with(name) if other in ids and ids[other].start() > match.start()]
        shared = ", ".join(f"{{{add('shared id', *match.span())}, {ids[other].group(2)}}}" for other in later)
        insertions.append(
            (match.start(), 0, f"inline const mutation::Flag {name}({match.group(2)}, {{{shared}}});  // ")
        )
    for position, _, inserted in sorted(insertions, key=lambda item: item[:2], reverse=True):
        text = text[:position] + inserted + text[position:]
    return text.replace("#pragma once\n", '#pragma once\n\n#include "mutation_switch.h"\n', 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the directory csrc")
    parser.add_argument("--output", type=Path, required=True, help="gets a copy of what the kernels' tests need")
    arguments = parser.parse_args()
    for directory in ("npu/kernels", "npu/host", "npu/tests/kernels", "tests"):
        for source in sorted((arguments.source / directory).glob("*.*")):
            if source.suffix in (".h", ".cpp"):
                target = arguments.output / directory / source.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    mutants: list[Mutant] = []
    for source in sorted((arguments.output / "npu/kernels").glob("*.h")):
        source.write_text(mutate(source.read_text(), source.name, mutants))
    lines = [f'    {{"{m.kind}", "{m.file}", {m.line}, R"({m.text})"}},' for m in mutants]
    (arguments.output / "mutants.inc").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
