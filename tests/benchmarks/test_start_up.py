# SPDX-License-Identifier: Apache-2.0
"""The page about start-up: medians, and ratios within a round."""

from benchmarks.start_up import page

MACHINE = {"date": "D", "cpu": "C", "threads": 2, "instruction_set": "I", "torch": "T", "vllm": "V", "commit": "H"}


def test_ratios_are_medians_of_those_within_a_round() -> None:
    seconds = {
        "as the platform chooses, cold": [20.0, 40.0, 20.0],
        "as the platform chooses, warm": [20.0, 20.0, 20.0],
        "with torch.compile, cold": [80.0, 50.0, 40.0],
        "with torch.compile, warm": [40.0, 40.0, 40.0],
    }
    lines = page({"machine": MACHINE | {"load": 0.1}, "checkpoint": "M", "seconds": seconds}).splitlines()
    assert lines[-3:] == [
        "| as the platform chooses | 20 | 20 |",
        "| with torch.compile | 50 | 40 |",
        "| ratio | 0.50x | 0.50x |",
    ]
