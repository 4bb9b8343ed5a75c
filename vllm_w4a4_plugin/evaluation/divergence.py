# SPDX-License-Identifier: Apache-2.0
"""Two models' predictions of the same tokens compared, as llama.cpp's `perplexity --kl-divergence` does. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import exp, log, sqrt

import numpy as np
import torch

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
_ROWS = 64
"""Tokens that are compared at a time, for whole vocabularies in float64 are large."""


@dataclass(frozen=True)
class Predictions:
    """What is kept of the predictions of consecutive tokens; every array has one entry per token.

    Attributes:
        targets: the tokens that follow, int64.
        losses: their negative log probability, float64.
        choices: the likeliest tokens, int64.
        reference_losses, reference_choices: the same of the reference.
        divergences: Kullback-Leibler divergence of the model from the reference in nats, float64.
    """

    targets: np.ndarray
    losses: np.ndarray
    choices: np.ndarray
    reference_losses: np.ndarray
    reference_choices: np.ndarray
    divergences: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Those of several windows in one."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def compare(logprobs: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> Predictions:
    """The predictions of one window.

    Args:
        logprobs: float32 [tokens, vocabulary] of the model.
        reference: the same of the reference.
        targets: int64 [tokens], the tokens that follow.
    """
    divergences = []
    for first in range(0, len(targets), _ROWS):
        p, q = reference[first : first + _ROWS].double(), logprobs[first : first + _ROWS].double()
        terms = p.exp() * (p - q)
        # A token that the reference excludes adds nothing, even if the model excludes it too.
        divergences.append(torch.where(p == -torch.inf, 0.0, terms).sum(-1).clamp(min=0))
    column = targets[:, None]
    return Predictions(
        targets.numpy(),
        -logprobs.gather(1, column)[:, 0].double().numpy(),
        logprobs.argmax(-1).numpy(),
        -reference.gather(1, column)[:, 0].double().numpy(),
        reference.argmax(-1).numpy(),
        torch.cat(divergences).numpy(),
    )


@dataclass(frozen=True)
class Summary:
    """What the predictions come to.

    Attributes:
        tokens: how many were predicted.
        perplexity, reference_perplexity: of the two models.
        ratio: of the two perplexities. ratio_error: its standard error; the tokens are the same, so it is far smaller
            than that of the perplexities.
        mean, mean_error: of the divergence, with its standard error, in nats.
        percentiles: of the divergence.
        maximum: of the divergence.
        agreement, agreement_error: share of tokens of which both models call the same one likeliest, with its standard
            error.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    ratio: float
    ratio_error: float
    mean: float
    mean_error: float
    percentiles: dict[float, float]
    maximum: float
    agreement: float
    agreement_error: float


def summarize(predictions: Predictions) -> Summary:
    """The figures of a comparison of at least one token."""
    divergences, count = predictions.divergences, len(predictions.divergences)
    agreement = float((predictions.choices == predictions.reference_choices).mean())
    difference = predictions.losses - predictions.reference_losses
    return Summary(
        count,
        exp(predictions.losses.mean()),
        exp(predictions.reference_losses.mean()),
        ratio := exp(difference.mean()),
        ratio * _error(difference),
        float(divergences.mean()),
        _error(divergences),
        {share: float(np.percentile(divergences, share)) for share in PERCENTILES},
        float(divergences.max()),
        agreement,
        sqrt(agreement * (1 - agreement) / max(1, count - 1)),
    )


def histogram(divergences: np.ndarray, bins: int = 32) -> list[tuple[float, float, int]]:
    """Counts of divergences in bins of equal width in the logarithm, (from, to, count); smaller ones in the first."""
    low, high = 1e-6, max(1e-5, float(divergences.max()))
    edges = np.exp(np.linspace(log(low), log(high), bins + 1))
    counts, _ = np.histogram(np.clip(divergences, edges[0], edges[-1]), edges)
    return [(float(a), float(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]


def worst_passages(windows: Sequence[Predictions], length: int = 32, count: int = 10) -> list[tuple[int, int, float]]:
    """The passages of `length` tokens with the largest mean divergence: (window, first token, mean), worst first.

    Passages do not overlap; what is left at the end of a window is one if it is at least half as long.
    """
    passages = [
        (number, first, float(part.mean()))
        for number, window in enumerate(windows)
        for first, part in _parts(window.divergences, length)
    ]
    return sorted(passages, key=lambda passage: -passage[2])[:count]


def _parts(values: np.ndarray, length: int) -> Iterable[tuple[int, np.ndarray]]:
    for first in range(0, len(values), length):
        part = values[first : first + length]
        if first == 0 or len(part) >= length / 2:
            yield first, part


def _error(values: np.ndarray) -> float:
    """Standard error of the mean; 0 of a single value."""
    return float(values.std(ddof=1) / sqrt(len(values))) if len(values) > 1 else 0.0
