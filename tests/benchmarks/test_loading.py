# SPDX-License-Identifier: Apache-2.0
"""Loading of a large checkpoint: every byte is read once, and the page has ratios within a round."""

from pathlib import Path

import pytest

from benchmarks import loading
from tests.benchmarks.test_start_up import MACHINE


def test_ratios_are_medians_of_those_within_a_round() -> None:
    record = {"recipe": "R", "threads": 2, "bytes": 2 * 10**9, "read": [1.0, 1.0, 4.0], "load": [2.0, 8.0, 5.0]}
    lines = loading.page({"machine": MACHINE | {"load": 0.1}, "layers": 3, "records": [record]}).splitlines()
    assert lines[-1] == "| R | 2 | 2.00 | 2.50 | 0.50 | 0.50 |"


@pytest.mark.parametrize("threads", [1, 3])
def test_the_threads_read_every_byte_once(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PIECE", 100)
    files = [tmp_path / name for name in "ab"]
    for file, size in zip(files, (950, 1), strict=True):
        file.write_bytes(bytes(size))
    taken: list[int] = []
    read = loading.os.preadv

    def watched(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        taken.append(read(descriptor, buffers, offset))
        return taken[-1]

    monkeypatch.setattr(loading.os, "preadv", watched)
    assert loading.read(files, threads) > 0
    assert sum(taken) == 951
