#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that a shared library's undefined symbols are defined by the libraries that it needs, as `ldd -r` would.

Nothing is loaded, because CANN's libraries need the driver, which is missing while an image is built.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

SYSTEM_DIRECTORIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(nm: str, library: Path, which: str) -> set[str]:
    """Dynamic symbols without versions; `which`: --defined-only, or --undefined-only, without weak ones."""
    lines = (line.split() for line in output_of(nm, "-D", which, str(library)).splitlines())
    is_undefined = which == "--undefined-only"
    return {fields[-1].split("@")[0] for fields in lines if not (is_undefined and fields[-2] in "wv")}


def needed(readelf: str, library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output_of(readelf, "-d", "-W", str(library)))


def undefined_symbols(library: Path, directories: Iterable[Path], nm: str, readelf: str) -> tuple[set[str], set[str]]:
    """Symbols of `library` that none of the libraries it needs defines, and the names of those that were not found."""
    undefined = symbols(nm, library, "--undefined-only")
    absent: set[str] = set()
    waiting, seen = needed(readelf, library), set[str]()
    while waiting and undefined:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        file = next((directory / name for directory in directories if (directory / name).exists()), None)
        if file is None:
            absent.add(name)
            continue
        undefined -= symbols(nm, file, "--defined-only")
        waiting += needed(readelf, file)
    return undefined, absent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nm", default="nm")
    parser.add_argument("--readelf", default="readelf")
    parser.add_argument("--search", type=Path, nargs="*", default=[], help="directories, searched before the system's")
    parser.add_argument("library", type=Path)
    arguments = parser.parse_args()
    system = [Path(name) for name in SYSTEM_DIRECTORIES]
    system += [directory for path in system if path.is_dir() for directory in path.glob("*-linux-gnu")]
    undefined, absent = undefined_symbols(
        arguments.library, [*arguments.search, *system], arguments.nm, arguments.readelf
    )
    if not undefined:
        return 0
    print(f"{arguments.library}: no library that it needs defines these symbols, so it could not be loaded:")
    for symbol in sorted(undefined):
        print(f"  {symbol}")
    if absent:
        print(f"These libraries were not found: {', '.join(sorted(absent))}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
