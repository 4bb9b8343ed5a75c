#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Type-checks a device source as the device compiler's two passes see it: once for the AIC, once for the AIV.

In each pass the other kind's code is discarded, and the header takes no instruction of the other kind. The launch
`kernel<<<cores, nullptr, stream>>>(...)`, which is no C++, becomes a call.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", required=True)
    parser.add_argument("--include", type=Path, required=True, help="the emulation's directory")
    parser.add_argument("--core", choices=["AIC", "AIV"], required=True)
    parser.add_argument("source", type=Path)
    arguments = parser.parse_args()
    text, launches = re.subn(r"<<<[^<>;]*>>>", "", arguments.source.read_text())
    if launches == 0:
        print(f"{arguments.source}: no launch found")
        return 1
    command = [arguments.compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unused-parameter", "-Wno-unused-but-set-parameter", "-Wno-unused-variable"]
    command += ["-Wno-unused-but-set-variable"]
    command += [f"-DW4A4_PASS_{arguments.core}", f"-I{arguments.include}", f"-I{arguments.source.parent}"]
    result = subprocess.run([*command, "-x", "c++", "-"], input=f'#line 1 "{arguments.source}"\n{text}', text=True)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
