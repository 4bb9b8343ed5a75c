# SPDX-License-Identifier: Apache-2.0
"""The page of the end-to-end benchmark: ratios within one run, one section per run."""

from typing import Any

from benchmarks.report import end_to_end


def run(layers: int) -> dict[str, Any]:
    machine = {"date": "D", "cpu": "C", "threads": 2, "instruction_set": "I", "torch": "T", "vllm": "V"}
    common = {"ready": 10.0, "decode 16": 1.0}
    return {
        "machine": machine | {"commit": "H", "load": 0.0},
        "model": "M",
        "layers": layers,
        "records": {
            "float bfloat16": common | {"prefill": 8.0, "decode 1": 1.0, "memory": 8e9, "step_bytes": 8e9},
            "all-w4a4 bfloat16": common | {"prefill": 2.0, "decode 1": 0.3, "memory": 3e9, "step_bytes": 2e9},
        },
    }


def test_ratios_are_those_of_one_run() -> None:
    lines = end_to_end([run(36)]).splitlines()
    # 1 / 0.3 times faster, of the 8 / 2 that the bytes allow.
    assert "| all-w4a4 bfloat16 | 4.0x | 3.33x | 83% | 1.0x | 0.38x |" in lines


def test_every_run_has_a_section() -> None:
    page = end_to_end([run(36), run(9)])
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## The shape of M, 36 layers",
        "## The shape of M, 9 layers",
    ]
