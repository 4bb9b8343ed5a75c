# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: figures and answers side by side."""

from math import log

import pytest

from tools.demo_comparison import QUESTIONS, Measured, perplexity_of, table


def test_perplexity_is_the_inverse_geometric_mean_of_the_probabilities() -> None:
    # vLLM's reply: nothing for the first token, then an entry per token, by its number.
    reply = [None, {"17": {"logprob": log(0.5)}}, {"4": {"logprob": log(0.125)}}]
    assert perplexity_of(reply) == pytest.approx(4)


def test_answers_stand_side_by_side() -> None:
    long = "A model of language " * 6
    models = [
        Measured("float", 270_000_000, 20.4, 31.2, 12.34, ("Paris.", "Red.\n\nBlue.", long)),
        Measured("W4A4", 110_000_000, 18.1, 50.0, 14.0, ("It is Paris.", "Red", "A model")),
    ]
    lines = table(models).splitlines()
    column = lines[0].index("W4A4")
    assert lines[0].split() == ["float", "W4A4"]
    assert lines[2].split() == ["weights", "270", "MB", "110", "MB"]
    assert [line[column:] for line in lines if "Paris" in line] == ["It is Paris."]
    assert max(map(len, lines)) <= 120
    left = " ".join(line[column - 44 : column].strip() for line in lines)
    assert left.endswith(long.strip())
    assert "Red. Blue." in left
    names = " ".join(line[: column - 44].strip() for line in lines if line[: column - 44].strip())
    assert all(question in names for question in QUESTIONS)
