# SPDX-License-Identifier: Apache-2.0
"""The benchmark of experts: every contestant gets the same experts, and the page shows what was measured."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import report_experts
from benchmarks.expert_peers import OURS, PEERS, PreparedExperts
from benchmarks.experts import _in_turn
from benchmarks.shapes import EXPERTS, Experts

SMALL = Experts("small", count=6, top_k=3, hidden=128, intermediate=64)


def test_shape_of_qwen3_30b_a3b() -> None:
    (experts,) = EXPERTS
    assert str(experts) == "128 experts 2048x768, top 8"
    assert experts.values == 3 * 2048 * 768


def test_a_token_goes_to_different_experts_with_weights_that_sum_to_one() -> None:
    weights, ids = SMALL.routing(200, torch.Generator().manual_seed(0))
    assert weights.shape == ids.shape == (200, 3)
    assert weights.sum(-1).sub(1).abs().max() < 1e-6
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert set(ids.flatten().tolist()) == set(range(6))


def test_contestants_get_the_same_experts_in_the_same_round() -> None:
    routings = [SMALL.routing(1, torch.Generator().manual_seed(seed)) for seed in range(3)]
    seen: dict[str, list[Tensor]] = {"a": [], "b": []}

    def peer(name: str) -> PreparedExperts:
        def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            seen[name].append(ids)
            return x

        return PreparedExperts(run, name)

    runs = [_in_turn(peer(name), torch.zeros(1, 64), routings) for name in seen]
    for _ in range(4):
        for run in runs:
            run()
    expected = [routings[i][1] for i in (0, 1, 2, 0)]
    for ids in seen.values():
        assert all(map(torch.equal, ids, expected))


@pytest.mark.parametrize("name", OURS)
def test_our_weights_have_the_bytes_that_are_compared_with_reading(name: str) -> None:
    prepared = PEERS[name](SMALL)
    assert prepared.weight_bytes == SMALL.count * SMALL.values // 2  # sizes that the packed form does not pad
    y = prepared.run(torch.randn(5, 128, dtype=prepared.dtype), *SMALL.routing(5, torch.Generator().manual_seed(1)))
    assert y.shape == (5, 128)
    assert y.isfinite().all()


def record(tokens: int, of_dot_peak: float | None) -> dict[str, Any]:
    ours = {"speedup": {"q4_0": 2.5}, "of_read_bandwidth": 0.9, "of_dot_peak": of_dot_peak}
    return {
        "model": "M",
        "experts": "E",
        "tokens": tokens,
        "used": 7.6,
        "kernels": {"w4a4_flatquant": "F", "q4_0": "G"},
        "median": {"w4a4_flatquant": 0.00125, "q4_0": 0.003},
        "ours": {"w4a4_flatquant": ours},
    }


def test_the_table_has_a_row_for_each_type_and_number_of_tokens() -> None:
    head, _, *rows = report_experts.table([record(1, None), record(16, 0.5)])
    assert "speedup over llama.cpp Q4_0" in head
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells == [
        ["W4A4 FlatQuant", "1", "8", "1.250", "2.50x", "90%", "-"],
        ["W4A4 FlatQuant", "16", "8", "1.250", "2.50x", "90%", "50%"],
    ]


def test_figures_taken_under_load_or_beyond_a_limit_are_not_published() -> None:
    def faults(load: float, of_dot_peak: float) -> list[str]:
        return report_experts.faults({"machine": {"load": load}, "records": [record(16, of_dot_peak)]})

    assert faults(0.4, 1.04) == []
    assert faults(2.3, 0.5) == ["the load average was 2.3, more than 0.5"]
    assert faults(0.0, 1.77) == ["M W4A4 FlatQuant (ours), 16 tokens: of_dot_peak is 177%, more than 105%"]
