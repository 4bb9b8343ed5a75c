# SPDX-License-Identifier: Apache-2.0
"""Saving a run, and writing its page only if its figures can be trusted."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGEST_LOAD = 0.5
"""Load average before a run; beyond it, figures are not published."""

LARGEST_FRACTION = 1.05
"""Of a limit of the machine; beyond it, figures are not published."""

TRIES = 3
"""Of a row whose fraction of a limit cannot be."""


def load_faults(machine: dict[str, Any]) -> list[str]:
    """Why figures must not be published: other work on the machine."""
    if machine["load"] > LARGEST_LOAD:
        return [f"the load average was {machine['load']:.1f}, more than {LARGEST_LOAD}"]
    return []


def beyond_limits(row: dict[str, Any]) -> list[str]:
    """Which shares of the machine's limits in a row cannot be: the limit was measured while something disturbed it."""
    return [
        f"{key} is {row[key]:.0%}, more than {LARGEST_FRACTION:.0%}"
        for key in ("of_read_bandwidth", "of_dot_peak", "of_fma_peak")
        if (row.get(key) or 0) > LARGEST_FRACTION
    ]


def believable(
    measure: Callable[[], dict[str, Any]], rows: Callable[[dict[str, Any]], list[dict[str, Any]]]
) -> dict[str, Any]:
    """What `measure` returns, taken again up to `TRIES` times while a row of it is beyond a limit."""
    for _ in range(TRIES):
        record = measure()
        if not any(map(beyond_limits, rows(record))):
            break
    return record


def refuse_if(faults: list[str]) -> None:
    """End the program, before it writes a page, if there are reasons why figures must not be published."""
    if faults:
        sys.exit("not written, because the figures are not to be trusted:\n  " + "\n  ".join(faults))


def publish(result: dict[str, Any], text: str, file: Path, docs: Path | None, name: str) -> None:
    """Save a run as JSON and print its page; with `docs`, also write the page there, unless other work was running.

    Args:
        name: of the page below `docs`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(text)
    if docs:
        refuse_if(load_faults(result["machine"]))
        (docs / name).write_text(text)
