#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Type-checks a device source as the device compiler's two passes see it: once for the AIC, once for the AIV.

In each pass the code for the other kind of core is discarded, and the header rejects that kind's instructions. A launch
`kernel<<<cores, nullptr, stream>>>(...)`, which is not C++, becomes a call.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

INCLUDE = Path(__file__).resolve().parents[1] / "include"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--core", choices=["AIC", "AIV"], required=True)
    parser.add_argument("--expect-launch", action="store_true", help="fail if the source has no launch")
    parser.add_argument("source", type=Path)
    arguments = parser.parse_args()
    text, launches = re.subn(r"<<<[^<>;]*>>>", "", arguments.source.read_text())
    if arguments.expect_launch and launches == 0:
        print(f"{arguments.source}: no launch found")
        return 1
    command = [arguments.compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unused-parameter", "-Wno-unused-but-set-parameter", "-Wno-unused-variable"]
    command += ["-Wno-unused-but-set-variable"]
    command += [f"-DASCENDC_EMULATOR_PASS_{arguments.core}", f"-I{INCLUDE}", f"-I{arguments.source.parent}"]
    result = subprocess.run([*command, "-x", "c++", "-"], input=f'#line 1 "{arguments.source}"\n{text}', text=True)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
