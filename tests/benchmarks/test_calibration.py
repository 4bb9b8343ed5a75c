# SPDX-License-Identifier: Apache-2.0
"""The table of calibration quality: means over what was measured, and what was not."""

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.calibration.cases import CASES
from benchmarks.calibration.results import HEADER, MISSING, SIMULATED, Cost, Result, read_results, rows

RESULTS = [
    Result("float", 0, 32.0, []),
    Result("tutorial", 0, 38.0, [38.0, 38.38], Cost(100, 190, 2 * 10**9)),
    Result("tutorial", 2, 39.0, [], Cost(110, 210, 3 * 10**9)),
    *(Result("w4a4-w8a8", seed, 40.0 + seed, []) for seed in (0, 1, 2)),
]


def test_rows_show_means_and_what_is_missing() -> None:
    found = {row[0]: dict(zip(HEADER, row, strict=True)) for row in rows(RESULTS)}
    assert set(found) == {"float"} | {case.name for case in CASES}
    tutorial = found["tutorial"]
    assert tutorial["mean"] == "38.50 (2 of 3 seeds)"
    assert [tutorial[f"seed {seed}"] for seed in (0, 1, 2)] == ["38.00", MISSING, "39.00"]
    assert tutorial[SIMULATED] == "38.19 (+0.5 %)"
    assert (tutorial["seconds"], tutorial["CPU seconds"], tutorial["GB"]) == ("105", "200", "3.00")
    assert found["w4a4-w8a8"]["mean"] == "41.00"
    assert found["all-w4a4"]["mean"] == MISSING
    assert found["float"]["mean"] == "32.00"


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps([asdict(result) for result in RESULTS]))
    assert read_results(file) == RESULTS


def test_cases_that_continue_another_have_its_recipe() -> None:
    named = {case.name: case for case in CASES}
    for case in CASES:
        if case.start:
            assert case.options[:2] == named[case.start].options[:2]
            assert named[case.start].options[2:] == ["--distill", "0"]
