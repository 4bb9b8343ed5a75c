# SPDX-License-Identifier: Apache-2.0
"""The report page, read by an HTML parser."""

from dataclasses import asdict
from html.parser import HTMLParser

import pytest

from vllm_w4a4_plugin.calibration.block.report import LayerReport
from vllm_w4a4_plugin.calibration.run.records import BlockRecord
from vllm_w4a4_plugin.calibration.run.report import LAYER_HEADER, render

HOSTILE = """<script>alert("1 & 2")</script>'{{ title }}{% raw %}"""


class Page(HTMLParser):
    """Tags of a page with their attributes, and the texts inside them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1], data))

    def of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def count(self, tag: str) -> int:
        return [name for name, _ in self.tags].count(tag)


def block(number: int, layer: str = "q_proj", loss: float | None = 0.1) -> BlockRecord:
    curves = [[0.5, 1.0 + number, 2.0], [0.9, 1.0, 1.1]]
    report = LayerReport(
        f"model.layers.{number}.{layer}", "W4A4_FLATQUANT_DYNAMIC", [8, 6], 1_234_567, 0.2, 0.05, 0.9, [2, 3],
        activation_curves=curves, weight_curves=curves,
    )  # fmt: skip
    return BlockRecord(f"model.layers.{number}", {}, [], loss, [asdict(report)])


def test_names_and_values_are_escaped() -> None:
    page = Page(render(f"title {HOSTILE}", [(f"fact {HOSTILE}", f"value {HOSTILE}")], [block(0, HOSTILE)]))
    assert page.count("script") == 0
    assert page.of("title") == page.of("h1") == [f"title {HOSTILE}"]
    assert {f"fact {HOSTILE}", f"value {HOSTILE}", f"model.layers.0.{HOSTILE}"} <= set(page.of("td"))
    assert f"model.layers.0.{HOSTILE}: activations (channels, sorted)" in page.of("figcaption")
    assert f"{HOSTILE}, blocks first to last" in page.of("figcaption")


def test_layers_and_figures() -> None:
    page = Page(render("a model", [("seed", "7")], [block(0), block(1), block(2), block(3)]))
    assert tuple(page.of("th")) == LAYER_HEADER
    assert page.of("td")[:2] == ["seed", "7"]
    assert page.of("td")[2:9] == ["model.layers.0.q_proj", "W4A4_FLATQUANT_DYNAMIC", "20.0 %", "5.0 %", "0.90", "2, 3",
                                  "1.23"]  # fmt: skip
    assert page.of("h2") == ["Error per block", "Flatness", "Error per layer", "Layers"]
    # Losses; activations and weights of the first, the middle and the last block; errors of the one kind of layer.
    assert page.count("svg") == 1 + 2 * 3 + 1
    assert page.count("polyline") == 1 + 2 * 2 * 3 + 2


def test_curves_stay_between_the_axes() -> None:
    page = Page(render("a model", [], [block(5)]))
    points = [attributes["points"] for tag, attributes in page.tags if tag == "polyline"]
    # In the second figure (activations), three channels; the largest value, 6, is at the top of the first curve.
    assert points[1] == "30.0,112.5 210.0,30.0 390.0,90.0"
    assert page.of("text")[2:4] == ["6", "0"]


@pytest.mark.parametrize("records", [[], [BlockRecord("model.layers.0", {}, [], None, [])]])
def test_nothing_to_show(records: list[BlockRecord]) -> None:
    page = Page(render("a model", [], records))
    assert page.of("h2") == ["Flatness", "Layers"]
    assert page.count("svg") == 0
