# SPDX-License-Identifier: Apache-2.0
"""`quantization_report.html`: one self-contained page about a finished quantization."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..block.report import LayerReport
from .records import BlockRecord

REPORT_FILE = "quantization_report.html"
LAYER_HEADER = ("layer", "type", "error before", "error after", "clip", "L, R", "MB", "note")
_TEMPLATES = Path(__file__).parent / "templates"
_COLORS = ("#c0392b", "#2471a3")


@dataclass
class _Line:
    color: str
    points: str


@dataclass
class _Figure:
    """A line chart: pixels of the picture and of its axes, the label of the largest value, and the curves."""

    caption: str
    largest: str
    lines: list[_Line]
    width: int = 420
    height: int = 150
    left: int = 30
    right: int = 390
    top: int = 30
    bottom: int = 120


def render(title: str, facts: Sequence[tuple[str, str]], records: Sequence[BlockRecord]) -> str:
    """The page as HTML; every name and value is escaped.

    Args:
        title: heading.
        facts: name and value pairs shown at the top.
        records: of all blocks.
    """
    layers = [layer for record in records for layer in record.layers()]
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        facts=facts,
        losses=_losses([record.loss for record in records if record.loss is not None]),
        flatness=[_flatness(layer) for layer in _examples(layers)],
        errors=_errors(layers),
        header=LAYER_HEADER,
        rows=[layer_row(layer) for layer in layers],
    )


def layer_row(layer: LayerReport) -> list[str]:
    """Cells under `LAYER_HEADER`, empty where a value does not exist."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    clip = "" if layer.clip is None else f"{layer.clip:.2f}"
    factors = ", ".join(map(str, layer.factors))
    size = f"{layer.nbytes / 1e6:.2f}"
    return [
        layer.name,
        layer.quant_type,
        percent(layer.before),
        percent(layer.after),
        clip,
        factors,
        size,
        "; ".join(filter(None, (layer.fallback, layer.note))),
    ]


def _losses(losses: list[float]) -> _Figure | None:
    return _figure("blocks, first to last", [losses]) if losses else None


def _errors(layers: Sequence[LayerReport]) -> list[_Figure]:
    """One picture per kind of layer, over the blocks."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for layer in layers:
        if layer.before is not None and layer.after is not None:
            kinds.setdefault(layer.name.rpartition(".")[2], []).append((layer.before, layer.after))
    return [_figure(f"{kind}, blocks first to last", list(zip(*errors, strict=True))) for kind, errors in kinds.items()]


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


def _flatness(layer: LayerReport) -> tuple[_Figure, _Figure]:
    return (
        _figure(f"{layer.name}: activations (channels, sorted)", layer.activation_curves),
        _figure(f"{layer.name}: weights (input channels, sorted)", layer.weight_curves),
    )


def _figure(caption: str, series: Sequence[Sequence[float]]) -> _Figure:
    """The chart of one or two curves; of two, the first is what was before."""
    top = max((max(values) for values in series if values), default=1.0) or 1.0
    figure = _Figure(caption, f"{top:.3g}", [])
    inner_width, inner_height = figure.right - figure.left, figure.bottom - figure.top
    for values, color in zip(series, _COLORS if len(series) > 1 else _COLORS[1:], strict=False):
        step = inner_width / max(1, len(values) - 1)
        points = " ".join(
            f"{figure.left + i * step:.1f},{figure.bottom - v / top * inner_height:.1f}" for i, v in enumerate(values)
        )
        figure.lines.append(_Line(color, points))
    return figure
