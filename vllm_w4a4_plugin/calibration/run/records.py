# SPDX-License-Identifier: Apache-2.0
"""What is known of a quantized model beyond its tensors."""

from dataclasses import dataclass, field
from typing import Any

from ..block.report import LayerReport


@dataclass
class BlockRecord:
    """A finished block, as it is kept in JSON.

    Attributes:
        name: full name of the block.
        types: quant type by full name of the tensor.
        groups: linear layers, by their names in the block, that share an input.
        loss: relative error of what the block adds to the residual stream; None if another checkpoint supplied it.
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
