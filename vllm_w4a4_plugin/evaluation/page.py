# SPDX-License-Identifier: Apache-2.0
"""An evaluation as one HTML page without scripts or further files. Everything that comes from files is escaped."""

from collections.abc import Sequence
from html import escape
from math import log10
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { text-align: left; padding: .2rem .8rem; border-bottom: 1px solid #ddd; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.passage { background: #f6f6f6; padding: .6rem .8rem; margin: .6rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.passage small { display: block; color: #666; white-space: normal; }
svg text { font-size: 11px; fill: #444; }
"""

_SHADED_FROM, _SHADED_TO = 0.01, 5.0
"""Divergences in nats between which the background of a token goes from white to red."""


def html_page(facts: dict[str, Any]) -> str:
    """The page of what `as_json` returns."""
    title = f"Evaluation of {facts['model']['directory']}"
    parts = [f"<h1>{escape(title)}</h1>", _models(facts)]
    if "divergence" in facts:
        parts += [_divergence(facts["divergence"]), _histogram(facts["histogram"]), _passages(facts["worst_passages"])]
    if "tasks" in facts["model"]:
        parts.append(_tasks(facts))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first cell of a row is text, the others are numbers."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><td>{escape(row[0])}</td>" + "".join(f'<td class="n">{escape(cell)}</td>' for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _models(facts: dict[str, Any]) -> str:
    rows = [
        (model["directory"], f"{model['perplexity']:.3f}", str(model["tokens"]))
        for model in (facts.get("reference"), facts["model"])
        if model is not None and "perplexity" in model
    ]
    return _table(("model", "perplexity", "tokens"), rows) if rows else ""


def _divergence(summary: dict[str, Any]) -> str:
    rows = [
        ("mean", f"{summary['mean']:.5f} \N{PLUS-MINUS SIGN} {summary['mean_error']:.5f}"),
        *((f"{share} % percentile", f"{value:.5f}") for share, value in summary["percentiles"].items()),
        ("largest", f"{summary['maximum']:.5f}"),
        (
            "same likeliest token",
            f"{100 * summary['agreement']:.2f} \N{PLUS-MINUS SIGN} {100 * summary['agreement_error']:.2f} %",
        ),
    ]
    return "<h2>Kullback-Leibler divergence from the float model, nats per token</h2>" + _table(("", ""), rows)


def _histogram(bins: Sequence[dict[str, Any]]) -> str:
    width, height, bottom = 720, 180, 24
    most = max(1, *(entry["tokens"] for entry in bins))
    step = width / len(bins)
    bars = "".join(
        f'<rect x="{number * step + 0.5:.1f}" y="{height - height * entry["tokens"] / most:.1f}" '
        f'width="{step - 1:.1f}" height="{height * entry["tokens"] / most:.1f}" fill="#4477aa">'
        f"<title>{entry['from']:.2g} to {entry['to']:.2g}: {entry['tokens']} tokens</title></rect>"
        for number, entry in enumerate(bins)
    )
    first, last = log10(bins[0]["from"]), log10(bins[-1]["to"])
    ticks = "".join(
        f'<text x="{(power - first) / (last - first) * width:.1f}" y="{height + 16}">{10.0**power:g}</text>'
        for power in range(round(first), int(last) + 1)
    )
    return (
        f'<h2>Distribution</h2><svg viewBox="0 0 {width} {height + bottom}" role="img" '
        f'aria-label="number of tokens by divergence">{bars}{ticks}</svg>'
    )


def _passages(passages: Sequence[dict[str, Any]]) -> str:
    parts = [
        "<h2>Worst passages</h2><p>The redder a token, the farther the prediction of it. Point at one to see what the "
        "models hold for likeliest in its place.</p>"
    ]
    for passage in passages:
        tokens = "".join(_token(token) for token in passage["tokens"])
        parts.append(
            f'<div class="passage"><small>window {passage["window"]}, from token {passage["first_token"]}, mean '
            f"{passage['mean_divergence']:.3f}</small>{tokens}</div>"
        )
    return "\n".join(parts)


def _token(token: dict[str, Any]) -> str:
    divergence = token["divergence"]
    low, high = log10(_SHADED_FROM), log10(_SHADED_TO)
    share = min(1.0, max(0.0, (log10(max(divergence, 1e-9)) - low) / (high - low)))
    note = f"{divergence:.3f}; float: {token['reference_choice']!r}, quantized: {token['choice']!r}"
    style = f"background: rgba(220, 60, 40, {share:.2f})"
    return f'<span style="{style}" title="{escape(note)}">{escape(token["text"])}</span>'


def _tasks(facts: dict[str, Any]) -> str:
    others = facts.get("reference", {}).get("tasks", {})

    def cell(entry: dict[str, Any] | None) -> str:
        if entry is None:
            return ""
        error = entry["standard_error"]
        return f"{entry['value']:.4f}" + ("" if error is None else f" \N{PLUS-MINUS SIGN} {error:.4f}")

    rows = [
        (f"{task}: {metric}", cell(others.get(task, {}).get(metric)), cell(entry))
        for task, found in facts["model"]["tasks"].items()
        for metric, entry in found.items()
    ]
    return "<h2>Tasks</h2>" + _table(("task", "float", "quantized"), rows)
