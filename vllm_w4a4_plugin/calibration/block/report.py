# SPDX-License-Identifier: Apache-2.0
"""What the user is told about each linear layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.types import CLIP_RATIO

from ..model.block import LoadedBlock
from ..model.structure import Group
from .quantized import QuantizedGroup
from .rounding import absmax_scale, quantize_tokens, round_to_nearest
from .storage import StoredLinear

REPORT_TOKENS = 512
CURVE_POINTS = 64


@dataclass
class LayerReport:
    """A row of the report.

    Attributes:
        name: full module name.
        quant_type: as written in the description.
        shape: [output_size, input_size].
        nbytes: of all its tensors.
        before, after: |error| / |output| of rounding to nearest without a transform, and as quantized here.
        clip: activation clip ratio, None where there is none.
        factors: sizes of left_trans and right_trans.
        activation_curves, weight_curves: magnitude per channel, sorted, before and after the transform.
    """

    name: str
    quant_type: str
    shape: list[int]
    nbytes: int
    before: float | None = None
    after: float | None = None
    clip: float | None = None
    factors: list[int] = field(default_factory=list)
    activation_curves: list[list[float]] = field(default_factory=list)
    weight_curves: list[list[float]] = field(default_factory=list)


def report_float(block: LoadedBlock, group: Group) -> list[LayerReport]:
    """Of layers that stay as they are."""
    reports = []
    for name in group.linears:
        weight = block.linear(name).weight
        nbytes = weight.numel() * block.stored_dtype(f"{name}.weight").itemsize
        reports.append(LayerReport(f"{block.name}.{name}", QuantType.FLOAT, list(weight.shape), nbytes))
    return reports


def report_quantized(
    block: LoadedBlock, group: Group, x: Tensor, quantized: QuantizedGroup, stored: Mapping[str, StoredLinear]
) -> list[LayerReport]:
    """Of the layers of a quantized group.

    Args:
        block: to which the group belongs.
        group: its layers' weights in the block are those before the transform.
        x: [tokens, input_size], the group's input.
        quantized: the same group.
        stored: what is written of each layer.
    """
    sample, weight = x[:: max(1, len(x) // REPORT_TOKENS)].to(block.device), block.weight(group)
    exact = sample @ weight.t()
    plain_scale = absmax_scale(weight, quantized.bits)
    plain_weight = round_to_nearest(weight, plain_scale, quantized.bits) * plain_scale
    plain = quantize_tokens(sample, 1.0, quantized.input.bits) @ plain_weight.t()
    after = quantized.input(sample) @ quantized.dequantized().t()
    curves: list[list[list[float]]] = [[], []]
    if stored[group.linears[0]].kind.spec.weight_bits < 8:
        curves = [
            [_curve(sample), _curve(quantized.input.transform(sample))],
            [_curve(weight), _curve(quantized.weight)],
        ]
    transform = quantized.input.transform
    factors = [len(f) for f in (transform.left, transform.right) if f is not None]
    sizes = block.output_sizes(group)
    outputs = zip(group.linears, exact.split(sizes, 1), plain.split(sizes, 1), after.split(sizes, 1), strict=True)
    return [
        LayerReport(
            f"{block.name}.{name}",
            stored[name].kind,
            [layer_exact.shape[1], x.shape[1]],
            stored[name].nbytes,
            _relative_error(layer_plain, layer_exact),
            _relative_error(layer_after, layer_exact),
            quantized.input.clip if CLIP_RATIO in stored[name].tensors else None,
            factors,
            *curves,
        )
        for name, layer_exact, layer_plain, layer_after in outputs
    ]


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def _curve(matrix: Tensor) -> list[float]:
    """Largest magnitude of each column, in descending order, at `CURVE_POINTS` places, relative to their mean."""
    peaks = matrix.abs().amax(0).sort(descending=True).values
    places = torch.linspace(0, len(peaks) - 1, min(CURVE_POINTS, len(peaks)), device=peaks.device).round().long()
    return [round(v, 4) for v in (peaks[places] / peaks.mean().clamp_min(1e-30)).tolist()]
