# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks say must be right even where nobody looks: shapes, ratios, the page."""

from benchmarks.measure import interleaved, median_ratio
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


def test_contestants_run_in_turn() -> None:
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, least=3)
    assert order == ["a", "b"] * 4  # one round to warm up
    assert [len(values) for values in times.values()] == [3, 3]


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
