# SPDX-License-Identifier: Apache-2.0
"""What is known of a quantized model beyond its tensors."""

from dataclasses import dataclass, field
from typing import Any

from ..block.guard import ROUNDED
from ..block.report import NOT_QUANTIZED, LayerReport


@dataclass
class BlockRecord:
    """A finished block, as it is kept in JSON.

    Attributes:
        name: full name of the block.
        types: quant type by full name of the tensor.
        groups: linear layers, by their names in the block, that share an input.
        loss: relative error of what the block adds to the residual stream, on held-out text if there is any; None if
            another checkpoint supplied the block.
        reports: fields of a `LayerReport` for each linear layer.
    """

    name: str
    types: dict[str, str]
    groups: list[list[str]]
    loss: float | None
    reports: list[dict[str, Any]] = field(default_factory=list)

    def layers(self) -> list[LayerReport]:
        """The reports, typed."""
        return [LayerReport(**report) for report in self.reports]


@dataclass(frozen=True)
class Distillation:
    """What distillation did.

    Attributes:
        steps: of training.
        start, end: Kullback-Leibler divergence of the predictions for held-out text from the float model's, before and
            after; None if no text is held out.
        kept: whether the checkpoint has the trained tensors; if not, those from before.
    """

    steps: int
    start: float | None
    end: float | None
    kept: bool

    def __str__(self) -> str:
        if self.start is None or self.end is None:
            return f"{self.steps} steps"
        verdict = "" if self.kept else "; undone, since it did not help"
        change = f"divergence on held-out text {self.start:.4g} before, {self.end:.4g} after"
        return f"{self.steps} steps; {change}{verdict}"


@dataclass(frozen=True)
class Outcome:
    """A run that is finished but for its report.

    Attributes:
        records: of all blocks.
        nbytes: size of all tensors of the checkpoint.
        distillation: None if there was none.
    """

    records: list[BlockRecord]
    nbytes: int
    distillation: Distillation | None

    @property
    def layers(self) -> list[LayerReport]:
        """What was done to each linear layer, in order of execution."""
        return [layer for record in self.records for layer in record.layers()]

    @property
    def fallbacks(self) -> list[LayerReport]:
        """The layers for which calibration, or a part of it, was undone."""
        return [layer for layer in self.layers if layer.fallback]

    @property
    def warnings(self) -> list[str]:
        """What the user should know about layers that calibration did not help at all, or that were not quantized."""
        found = []
        if names := [layer.name for layer in self.fallbacks if layer.fallback == ROUNDED]:
            count = f"{len(names)} of {len(self.layers)} layers are"
            found.append(
                f"{count} {ROUNDED}, because calibration made them worse on text that it had not seen: "
                f"{', '.join(names)}."
            )
        if unreached := self._unreached():
            found.append(
                f"no token of the calibration text goes to these experts, which are {ROUNDED}: {'; '.join(unreached)}. "
                "Give more text, or text of more kinds."
            )
        if parts := self._not_quantized():
            found.append(
                f"{', '.join(parts)} stay FLOAT in each block that has them: only linear layers with a known role are "
                "quantized."
            )
        return found

    def _unreached(self) -> list[str]:
        """Of each layer of experts that has such, its name and their numbers."""
        numbers = {layer.name.partition(".*")[0]: layer.unreached for layer in self.layers if layer.unreached}
        return [f"{name}: {', '.join(map(str, experts))}" for name, experts in numbers.items()]

    def _not_quantized(self) -> list[str]:
        """Names within a block of what belongs to no group."""
        names = (
            layer.name.removeprefix(f"{record.name}.")
            for record in self.records
            for layer in record.layers()
            if layer.note == NOT_QUANTIZED
        )
        return list(dict.fromkeys(names))
