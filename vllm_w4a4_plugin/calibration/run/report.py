# SPDX-License-Identifier: Apache-2.0
"""`quantization_report.html`: one self-contained page about a finished quantization."""

from collections.abc import Sequence
from html import escape

from ..block.report import LayerReport
from .records import BlockRecord

REPORT_FILE = "quantization_report.html"
_WIDTH, _HEIGHT, _MARGIN = 420, 150, 30
_COLORS = ("#c0392b", "#2471a3")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 74em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child, td:nth-child(2) { text-align: left }
figure { display: inline-block; margin: .2em 1em .2em 0 } figcaption { font-size: .9em }
.before { color: #c0392b } .after { color: #2471a3 }
svg text { font-size: 11px; fill: #555 }
"""


def render(title: str, facts: Sequence[tuple[str, str]], records: Sequence[BlockRecord]) -> str:
    """The page as HTML.

    Args:
        title: heading.
        facts: name and value pairs shown at the top.
        records: of all blocks.
    """
    layers = [layer for record in records for layer in record.layers()]
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in facts)
    return (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1><table>{rows}</table>"
        + _losses([record.loss for record in records if record.loss is not None])
        + "<h2>Flatness</h2><p>Largest magnitude per channel, sorted, relative to the mean over the channels: "
        '<span class="before">before</span> and <span class="after">after</span> the transform. A flat line is what '
        "4 bits represent best.</p>"
        + "".join(map(_flatness, _examples(layers)))
        + _errors(layers)
        + "<h2>Layers</h2>"
        + _layer_table(layers)
        + "</html>\n"
    )


def _losses(losses: list[float]) -> str:
    if not losses:
        return ""
    heading = "<h2>Error per block</h2><p>Of what the block adds to the residual stream, relative.</p>"
    return heading + _figure("blocks, first to last", [losses])


def _errors(layers: Sequence[LayerReport]) -> str:
    """One picture per kind of layer, over the blocks."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for layer in layers:
        if layer.before is not None and layer.after is not None:
            kinds.setdefault(layer.name.rpartition(".")[2], []).append((layer.before, layer.after))
    if not kinds:
        return ""
    figures = [
        _figure(f"{escape(kind)}, blocks first to last", list(zip(*errors, strict=True)))
        for kind, errors in kinds.items()
    ]
    return (
        "<h2>Error per layer</h2><p>Of each layer's output on calibration text, relative: rounding to nearest without "
        'a transform (<span class="before">before</span>) and <span class="after">as quantized here</span>, before any '
        "distillation.</p>" + "".join(figures)
    )


def _examples(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """Layers with curves of the first, the middle and the last block, one per input."""
    with_curves = [layer for layer in layers if layer.activation_curves]
    distinct = [
        layer
        for i, layer in enumerate(with_curves)
        if not i or layer.activation_curves != with_curves[i - 1].activation_curves
    ]
    blocks = sorted({_block(layer) for layer in distinct})
    chosen = {blocks[0], blocks[len(blocks) // 2], blocks[-1]} if blocks else set()
    return [layer for layer in distinct if _block(layer) in chosen]


def _block(layer: LayerReport) -> int:
    return int(next(part for part in layer.name.split(".") if part.isdigit()))


def _flatness(layer: LayerReport) -> str:
    name = escape(layer.name)
    return (
        _figure(f"{name}: activations (channels, sorted)", layer.activation_curves)
        + _figure(f"{name}: weights (input channels, sorted)", layer.weight_curves)
        + "<br>"
    )


def _figure(caption: str, series: Sequence[Sequence[float]]) -> str:
    top = max((max(values) for values in series if values), default=1.0) or 1.0
    inner_width, inner_height = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    lines = []
    for values, color in zip(series, _COLORS if len(series) > 1 else _COLORS[1:], strict=False):
        step = inner_width / max(1, len(values) - 1)
        points = " ".join(
            f"{_MARGIN + i * step:.1f},{_HEIGHT - _MARGIN - v / top * inner_height:.1f}" for i, v in enumerate(values)
        )
        lines.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.6" points="{points}"/>')
    base = _HEIGHT - _MARGIN
    axis = f'<path d="M{_MARGIN} {_MARGIN}V{base}H{_WIDTH - _MARGIN}" fill="none" stroke="#999"/>'
    labels = f'<text x="2" y="{_MARGIN + 4}">{top:.3g}</text><text x="2" y="{base}">0</text>'
    svg = f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img">{axis}{labels}{"".join(lines)}</svg>'
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _layer_table(layers: Sequence[LayerReport]) -> str:
    head = "<tr>" + "".join(f"<th>{h}</th>" for h in LAYER_HEADER) + "</tr>"
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in layer_row(layer)) + "</tr>" for layer in layers)
    return f"<table>{head}{body}</table>"


LAYER_HEADER = ("layer", "type", "error before", "error after", "clip", "L, R", "MB")


def layer_row(layer: LayerReport) -> list[str]:
    """Cells under `LAYER_HEADER`, empty where a value does not exist."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    clip = "" if layer.clip is None else f"{layer.clip:.2f}"
    factors = ", ".join(map(str, layer.factors))
    size = f"{layer.nbytes / 1e6:.2f}"
    return [layer.name, layer.quant_type, percent(layer.before), percent(layer.after), clip, factors, size]
