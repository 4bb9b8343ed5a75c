#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the device sources for what a device compiler does not accept or the documents do not describe.

No std headers (except <cstdint>, which is freestanding, in files that host and device share), no exceptions, heap,
virtual functions, double, static state or recursion; every function is `__aicore__`; every name of namespace AscendC is
in documented_names.txt. Where cores wait for each other, every kernel is `__schedmode__(1)`: CANN then starts all its
blocks together, so that kernels on several streams cannot hold the cores that the others wait for.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

FORBIDDEN = re.compile(
    r"\bstd::|\b(throw|try|catch|new|delete|malloc|free|printf|virtual|dynamic_cast|typeid|thread_local|goto|double|long"
    r"|mutable|co_await|co_return|requires|concept|consteval|constinit)\b|(?<!inline )\bstatic (?!constexpr|inline"
    r"|_cast|__aicore__)"
)
DOCUMENTED = frozenset(
    line
    for line in Path(__file__).with_name("documented_names.txt").read_text().splitlines()
    if not line.startswith("#")
)
FUNCTION = re.compile(
    r"^[ \t]*(?:template <[^;{]*>\s*)?[\w:<>,&* \t]*?\b(inline|__global__)\b[^;{}=]*?\b(\w+)\(", re.MULTILINE
)

KERNEL = re.compile(r"^(?P<head>[^\n;{}]*)\b__global__\b", re.MULTILINE)
WAITS_FOR_CORES = re.compile(r"\bAscendC::(SyncAll|CrossCoreWaitFlag)\b")


def without_comments(text: str) -> str:
    """`text` with comments blanked, lines unchanged."""
    return re.sub(r"//[^\n]*", "", text)


def body_after(text: str, begin: int) -> str:
    """The braces after `begin`, with what is between them; empty for a declaration."""
    opening = text.find("{", begin)
    if opening < 0:
        return ""
    depth = 0
    for index in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[opening : index + 1]
    return text[opening:]


def find_cycle(calls: dict[str, set[str]]) -> list[str]:
    """A cycle of functions that call each other, its first one repeated at the end; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, chain: list[str]) -> list[str]:
        if name in chain:
            return [*chain[chain.index(name) :], name]
        if name in done:
            return []
        for callee in sorted(calls[name]):
            if cycle := visit(callee, [*chain, name]):
                return cycle
        done.add(name)
        return []

    for name in sorted(calls):
        if cycle := visit(name, []):
            return cycle
    return []


def check(directory: Path, shared_with_host: frozenset[str]) -> list[str]:
    """Every finding of all sources in `directory`, each with file and line; `shared_with_host`: file names."""
    findings: list[str] = []
    bodies: dict[str, str] = {}
    unscheduled: list[str] = []
    waits_for_cores = False
    for path in sorted(directory.glob("*.*")):
        text = without_comments(path.read_text())
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{path.name}:{number}"
            if include := re.match(r'#include ([<"])([^>"]+)', line):
                is_own = include.group(1) == '"' and (directory / include.group(2)).is_file()
                is_api = include.group(2) == "kernel_operator.h"
                is_shared = path.name in shared_with_host and include.group(2) == "cstdint"
                if not (is_own or is_api or is_shared):
                    findings.append(f"{where}: a device source must not include {include.group(2)}")
            elif match := FORBIDDEN.search(line):
                findings.append(f"{where}: '{match.group().strip()}' is not for device code")
            for name in re.findall(r"\bAscendC::(\w+)", line):
                if name not in DOCUMENTED:
                    findings.append(f"{where}: AscendC::{name} is not in the list of documented names")
        waits_for_cores |= WAITS_FOR_CORES.search(text) is not None
        for match in KERNEL.finditer(text):
            if "__schedmode__(1)" not in match["head"]:
                number = text.count("\n", 0, match.start()) + 1
                unscheduled.append(f"{path.name}:{number}: its cores wait for each other, so it needs __schedmode__(1)")
        for match in FUNCTION.finditer(text):
            head = match.group()
            if "__aicore__" not in head and not re.search(r"\binline constexpr\b|\bconstexpr\b", head):
                number = text.count("\n", 0, match.start(2)) + 1
                findings.append(f"{path.name}:{number}: {match.group(2)} is not __aicore__")
            # Functions with the same name in several classes count as one, which can only find more.
            bodies[match.group(2)] = bodies.get(match.group(2), "") + body_after(text, match.end())
    if waits_for_cores:
        findings += unscheduled
    names = set(bodies)
    calls = {
        name: {callee for callee in re.findall(r"(?<!::)(?<![.\w])(\w+)(?:<[\w, ]*>)?\(", body) if callee in names}
        for name, body in bodies.items()
    }
    if cycle := find_cycle(calls):
        findings.append("recursion: " + " -> ".join(cycle))
    if not bodies:
        findings.append(f"no function found in {directory}")
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", type=Path, help="a directory of device sources")
    parser.add_argument(
        "--shared-with-host", metavar="FILE", action="append", default=[], help="a file that may include <cstdint>"
    )
    arguments = parser.parse_args()
    findings = check(arguments.kernels, frozenset(arguments.shared_with_host))
    for finding in findings:
        print(finding)
    print(f"check_sources: {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
