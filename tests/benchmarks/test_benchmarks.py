# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks say must be right even where nobody looks: shapes, ratios, the page."""

from functools import partial
from typing import Any

from benchmarks.measure import interleaved, median_ratio
from benchmarks.publishing import believable, beyond_limits
from benchmarks.report import table
from benchmarks.shapes import MODELS


def test_shapes_of_qwen3_32b() -> None:
    model = next(model for model in MODELS if model.name == "Qwen3-32B")
    assert [str(linear) for linear in model.linears] == [
        "qkv 5120x10240",
        "o 8192x5120",
        "gate_up 5120x51200",
        "down 25600x5120",
    ]


def test_each_contestant_runs_once_in_every_round_and_has_changing_neighbours() -> None:
    order: list[str] = []
    times = interleaved({name: partial(order.append, name) for name in "abc"}, seconds=0, least=20)
    rounds = ["".join(order[begin : begin + 3]) for begin in range(0, len(order), 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    assert [len(values) for values in times.values()] == [20] * 3  # a first round to warm up is not counted


def test_a_row_beyond_a_limit_is_measured_again_but_not_for_ever() -> None:
    shares = iter([1.07, 0.9, 1.5, 1.2, 1.3, 0.8])

    def record() -> dict[str, Any]:
        return {"of_read_bandwidth": next(shares), "of_dot_peak": None}

    assert believable(record, lambda row: [row])["of_read_bandwidth"] == 0.9
    assert beyond_limits(believable(record, lambda row: [row])) == ["of_read_bandwidth is 130%, more than 105%"]
    assert next(shares) == 0.8


def test_a_ratio_is_taken_within_a_round() -> None:
    # The machine was 10 times slower in the second round.
    assert median_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


def test_the_table_shows_every_record() -> None:
    record = {
        "linear": "qkv",
        "in": 64,
        "out": 32,
        "tokens": 1,
        "median": {"w4a4_flatquant": 0.00125},
        "speedup": {"bf16": 3.5},
        "of_read_bandwidth": 0.9,
        "of_dot_peak": None,
        "quantize_share": 0.1,
        "of_fma_peak": 0.5,
    }
    head, rule, *rows = table([record, {**record, "tokens": 4}])
    assert "speedup over bf16" in head
    assert set(rule) <= set("| -")
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells == ["qkv 64x32", "1", "1.250", "3.50x", "90%", "-", "10%", "50%"]
    assert len(rows) == 2
