#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""README.md shows the example as it is compiled, and the report that the example without one WaitFlag really gives."""

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", type=Path, required=True)
    parser.add_argument("--example", type=Path, required=True)
    parser.add_argument("--broken", required=True, help="the program without the WaitFlag")
    arguments = parser.parse_args()
    readme = arguments.readme.read_text()
    license_line, example = arguments.example.read_text().split("\n", 1)
    assert "SPDX" in license_line
    broken = subprocess.run([arguments.broken], capture_output=True, text=True)
    failures = []
    if broken.returncode != 1:
        failures.append(f"the broken example: expected exit code 1, found {broken.returncode}")
    for block, what in ((f"```cpp\n{example}```", "the example"), (f"```text\n{broken.stdout}```", "the report")):
        if block not in readme:
            failures.append(f"{arguments.readme} does not contain {what}:\n{block}")
    print("\n".join(failures) or "readme_test: README.md is up to date")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
