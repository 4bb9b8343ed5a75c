# SPDX-License-Identifier: Apache-2.0
"""Figures and pages of an evaluation, on made-up predictions."""

from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_w4a4_plugin.evaluation.divergence import Predictions, compare, histogram, summarize, worst_passages
from vllm_w4a4_plugin.evaluation.page import html_page
from vllm_w4a4_plugin.evaluation.report import as_json, tables
from vllm_w4a4_plugin.evaluation.run import Evaluation, Measured
from vllm_w4a4_plugin.evaluation.tasks import metrics


def log_of(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log().float()


def test_two_distributions_by_hand() -> None:
    p, q = [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], [[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]]
    found = compare(log_of(q), log_of(p), torch.tensor([0, 1]))
    assert found.divergences == pytest.approx([0.5 * log(2) - 0.25 * log(2), log(2)])
    assert found.losses == pytest.approx([log(4), log(2)])
    assert found.reference_losses[0] == pytest.approx(log(2))
    assert found.reference_losses[1] == np.inf  # the reference excludes what came
    assert found.choices[0] == 1
    assert found.reference_choices.tolist() == [0, 0]


def test_many_random_distributions() -> None:
    """With another formula, over more tokens than are compared at a time."""
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet(np.full(50, 0.3), 200), generator.dirichlet(np.full(50, 0.3), 200)
    found = compare(torch.tensor(np.log(q)), torch.tensor(np.log(p)), torch.zeros(200, dtype=torch.int64))
    expected = np.array([sum(a * log(a / b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)])
    assert found.divergences == pytest.approx(expected)
    summary = summarize(found)
    assert summary.mean == pytest.approx(expected.mean())
    assert summary.percentiles[99.0] == pytest.approx(np.quantile(expected, 0.99))
    assert summary.agreement == (p.argmax(1) == q.argmax(1)).mean()
    assert summary.perplexity == pytest.approx(exp(-np.log(q[:, 0]).mean()))
    assert summary.ratio == pytest.approx(summary.perplexity / summary.reference_perplexity)


def test_equal_models() -> None:
    same = torch.randn(10, 7).log_softmax(-1)
    summary = summarize(compare(same, same, torch.arange(10) % 7))
    assert (summary.mean, summary.maximum, summary.agreement, summary.ratio) == (0, 0, 1, 1)
    assert (summary.ratio_error, summary.agreement_error) == (0, 0)


def predictions(divergences: list[float]) -> Predictions:
    zeros, count = np.zeros(len(divergences)), len(divergences)
    ids = np.arange(count)
    return Predictions(ids, zeros, ids, zeros, ids, np.array(divergences))


def test_the_histogram_counts_every_token() -> None:
    counts = histogram(np.array([0.0, 1e-9, 1e-3, 0.5, 20.0]))
    assert sum(count for _, _, count in counts) == 5
    assert counts[0][2] == 2
    assert counts[-1][2] == 1


def test_worst_passages_do_not_overlap_and_come_in_order() -> None:
    windows = [predictions([0.0] * 40 + [9.0] * 24), predictions([1.0] * 32 + [50.0])]
    found = worst_passages(windows, 32, 3)
    # The one token at the end of the second window is no passage.
    assert found == [(0, 32, pytest.approx(6.75)), (1, 0, pytest.approx(1.0)), (0, 0, pytest.approx(0.0))]
    assert len(worst_passages([predictions([1.0])])) == 1


def test_metrics_of_the_harness() -> None:
    values = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "bleu,strip": 3,
        "bleu_stderr,strip": "N/A",
        "n": 7,
    }
    assert metrics(values) == {"acc": (0.5, 0.1), "bleu (strip)": (3.0, None)}


def evaluation() -> Evaluation:
    tasks = {"t<b>": {"acc": (0.5, 0.1), "bleu": (3.0, None)}}
    model = Measured(Path("/x/<i>q</i>"), 11.0, 64, 1.0, tasks)
    return Evaluation(
        model, Measured(Path("/x/f"), 10.0, 64, 1.0, {"t<b>": {"acc": (0.6, 0.1)}}), [predictions([0.1] * 64)]
    )


def test_the_page_escapes_what_files_say() -> None:
    page = html_page(as_json(evaluation(), lambda ids: f"<script>{ids[0]}</script>\"'&"))
    assert "<script" not in page
    assert "<i>" not in page
    assert "t<b>" not in page
    assert "&lt;script&gt;5&lt;/script&gt;&quot;&#x27;&amp;" in page
    assert page.count('<div class="passage">') == 2


def test_tables() -> None:
    text = tables(evaluation())
    assert "+10.0 %" in text
    assert "mean divergence" in text
    assert "0.6000 ± 0.1000  0.5000 ± 0.1000  -0.1000 ± 0.1414" in text
    alone = tables(Evaluation(Measured(Path("m"), 11.0, 64, 1.0)))
    assert "difference" not in alone
    assert alone.splitlines()[-1].split() == ["m", "11.000", "64", "1.0"]
