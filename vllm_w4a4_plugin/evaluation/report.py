# SPDX-License-Identifier: Apache-2.0
"""An evaluation as JSON and as tables. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from vllm_w4a4_plugin.text import format_table

from .divergence import Predictions, histogram, summarize, worst_passages
from .run import Evaluation, Measured
from .tasks import difference_error

Decode = Callable[[Sequence[int]], str]
"""The text of token ids."""


def as_json(evaluation: Evaluation, decode: Decode) -> dict[str, Any]:
    """Everything that is known, in JSON's types; what was not measured is absent.

    Args:
        evaluation: what was measured.
        decode: of the model's tokenizer, for the worst passages.
    """
    facts: dict[str, Any] = {"model": _model(evaluation.model)}
    if evaluation.reference is not None:
        facts["reference"] = _model(evaluation.reference)
    if evaluation.windows:
        everything = Predictions.joined(evaluation.windows)
        summary = asdict(summarize(everything))
        summary["percentiles"] = {f"{share:g}": value for share, value in summary["percentiles"].items()}
        facts["divergence"] = summary
        facts["histogram"] = [
            {"from": low, "to": high, "tokens": count} for low, high, count in histogram(everything.divergences)
        ]
        facts["worst_passages"] = [
            _passage(evaluation.windows[number], number, first, mean, decode)
            for number, first, mean in worst_passages(evaluation.windows, PASSAGE_TOKENS)
        ]
    return facts


PASSAGE_TOKENS = 32
"""Of a passage among the worst."""


def _passage(window: Predictions, number: int, first: int, mean: float, decode: Decode) -> dict[str, Any]:
    places = slice(first, first + PASSAGE_TOKENS)
    rows = zip(
        window.targets[places].tolist(),
        window.divergences[places].tolist(),
        window.reference_choices[places].tolist(),
        window.choices[places].tolist(),
        strict=True,
    )
    return {
        "window": number,
        # Token 0 of a window is not predicted.
        "first_token": first + 1,
        "mean_divergence": mean,
        "tokens": [
            {
                "text": decode([target]),
                "divergence": divergence,
                "reference_choice": decode([reference]),
                "choice": decode([choice]),
            }
            for target, divergence, reference, choice in rows
        ],
    }


def _model(measured: Measured) -> dict[str, Any]:
    facts: dict[str, Any] = {"directory": str(measured.directory)}
    if measured.perplexity is not None:
        facts |= {"perplexity": measured.perplexity, "tokens": measured.tokens, "seconds": measured.seconds}
    if measured.tasks:
        facts["tasks"] = {
            task: {metric: {"value": value, "standard_error": error} for metric, (value, error) in found.items()}
            for task, found in measured.tasks.items()
        }
    return facts


def tables(evaluation: Evaluation) -> str:
    """The figures as text."""
    parts = []
    models = [m for m in (evaluation.reference, evaluation.model) if m is not None]
    if evaluation.model.perplexity is not None:
        parts.append(_perplexities(models))
    if evaluation.windows:
        parts.append(_divergence(evaluation.windows))
    if evaluation.model.tasks:
        parts.append(_tasks(evaluation))
    return "\n\n".join(parts)


def _perplexities(models: Sequence[Measured]) -> str:
    def difference(measured: Measured) -> str:
        first = models[0].perplexity
        if measured is models[0] or first is None or measured.perplexity is None:
            return ""
        return f"{100 * (measured.perplexity / first - 1):+.1f} %"

    rows = [
        (str(m.directory), f"{m.perplexity:.3f}", difference(m), str(m.tokens), f"{m.seconds:.1f}")
        for m in models
        if m.perplexity is not None
    ]
    return format_table(("model", "perplexity", "difference", "tokens", "seconds"), rows)


def _divergence(windows: Sequence[Predictions]) -> str:
    summary = summarize(Predictions.joined(windows))
    rows = [
        ("ratio of perplexities", f"{summary.ratio:.4f}", _error(summary.ratio_error, 4)),
        ("mean divergence", f"{summary.mean:.5f}", _error(summary.mean_error, 5)),
        *((f"{share:g} % percentile", f"{value:.5f}", "") for share, value in summary.percentiles.items()),
        ("largest divergence", f"{summary.maximum:.5f}", ""),
        ("same likeliest token", f"{100 * summary.agreement:.2f} %", _error(100 * summary.agreement_error, 2, " %")),
    ]
    return format_table(("distance from the float model (nats per token)", "", "standard error"), rows)


def _tasks(evaluation: Evaluation) -> str:
    rows = []
    reference = evaluation.reference.tasks if evaluation.reference is not None else {}
    for task, found in evaluation.model.tasks.items():
        for metric, (value, error) in found.items():
            cells = [task, metric, "", f"{value:.4f}{_plus_minus(error)}", ""]
            if metric in reference.get(task, {}):
                other, other_error = reference[task][metric]
                cells[2] = f"{other:.4f}{_plus_minus(other_error)}"
                cells[4] = f"{value - other:+.4f}{_plus_minus(difference_error((error, other_error)))}"
            rows.append(cells)
    return format_table(("task", "metric", "float", "quantized", "difference"), rows)


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" \N{PLUS-MINUS SIGN} {error:.4f}"


def _error(value: float, digits: int, unit: str = "") -> str:
    return f"{value:.{digits}f}{unit}"
