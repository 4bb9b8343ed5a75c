# SPDX-License-Identifier: Apache-2.0
"""What the user is told about each linear layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.types import CLIP_RATIO

from ..model.block import LoadedBlock
from ..model.structure import Experts, Group
from .expert_results import QuantizedExperts
from .guard import ROUNDED, GroupErrors
from .quantized import QuantizedGroup
from .storage import StoredLinear

CURVE_POINTS = 64
NO_DIAGONAL = "no diagonal: experts have none"
NOT_QUANTIZED = "left FLOAT: no linear layer with a known role"


@dataclass
class LayerReport:
    """A row of the report.

    Attributes:
        name: full module name.
        quant_type: as written in the description.
        shape: [output_size, input_size].
        nbytes: of all its tensors.
        before, after: mean over tokens of |error| / |output|, of rounding to nearest without a transform and as
            quantized here; on text that is held out, if any is.
        clip: activation clip ratio, None where there is none.
        factors: sizes of left_trans and right_trans.
        activation_curves, weight_curves: magnitude per channel, sorted, before and after the transform.
        fallback: what was left out because it made the layer worse on text that is held out; mostly empty.
        note: what could not be done to the layer because of the structure of its block; mostly empty.
        unreached: of experts, the numbers of those that no token of the text goes to.
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
    fallback: str = ""
    note: str = ""
    unreached: list[int] = field(default_factory=list)


def report_others(block: LoadedBlock) -> list[LayerReport]:
    """Of the modules with matrices that belong to no group: experts, routers, and layers with an unknown role."""
    weights, prefix = block.model.weights, f"{block.name}."
    dtype = weights.dtype(next(name for name in weights.tensors if name.startswith(prefix)))
    linears = {name for group in block.groups.values() for name in group.linears}
    linears.update(name for experts in block.experts for name in experts.all_linears)
    modules: dict[str, list[Tensor]] = {}
    for name, parameter in block.module.named_parameters():
        module = name.rpartition(".")[0]
        if parameter.ndim > 1 and module not in linears:
            modules.setdefault(module, []).append(parameter)
    return [
        LayerReport(
            f"{prefix}{name}",
            QuantType.FLOAT,
            list(parameters[0].shape),
            sum(parameter.numel() for parameter in parameters) * dtype.itemsize,
            note=NOT_QUANTIZED,
        )
        for name, parameters in modules.items()
    ]


def report_float(block: LoadedBlock, group: Group) -> list[LayerReport]:
    """Of layers that stay as they are."""
    reports = []
    for name in group.linears:
        weight = block.linear(name).weight
        nbytes = weight.numel() * block.stored_dtype(f"{name}.weight").itemsize
        reports.append(LayerReport(f"{block.name}.{name}", QuantType.FLOAT, list(weight.shape), nbytes))
    return reports


def report_float_experts(block: LoadedBlock, experts: Experts) -> LayerReport:
    """Of experts that stay as they are."""
    weights = [block.linear(name).weight for name in experts.all_linears]
    prefix = f"{block.stored_experts(experts)}."
    nbytes = sum(info.nbytes for name, info in block.model.weights.tensors.items() if name.startswith(prefix))
    return LayerReport(prefix[:-1], QuantType.FLOAT, [experts.count, *weights[0].shape], nbytes)


def report_experts(block: LoadedBlock, experts: Experts, quantized: QuantizedExperts) -> list[LayerReport]:
    """Of gate, up and down of quantized experts, all experts together: their mean errors."""
    reports = []
    for projection, first in enumerate(experts.linears(0)):
        members = [quantized.linears[experts.linears(expert)[projection]] for expert in range(experts.count)]
        leaf = block.stored_linear(first).rpartition(".")[2]
        shape = list(block.linear(first).weight.shape)
        is_down = projection == 2
        reports.append(
            LayerReport(
                f"{block.stored_experts(experts)}.*.{leaf}",
                members[0].kind,
                [experts.count, *shape],
                sum(member.nbytes for member in members),
                quantized.plain.mean(projection),
                quantized.found.mean(projection),
                factors=quantized.factors[is_down],
                fallback=_rounded_experts(quantized.rounded[is_down], experts.count),
                note=NO_DIAGONAL if quantized.factors[is_down] else "",
                unreached=quantized.unreached,
            )
        )
    return reports


def _rounded_experts(numbers: list[int], count: int) -> str:
    if len(numbers) == count:
        return ROUNDED
    return f"experts {', '.join(map(str, numbers))} {ROUNDED}" if numbers else ""


def report_quantized(
    block: LoadedBlock,
    group: Group,
    sample: Tensor,
    quantized: QuantizedGroup,
    stored: Mapping[str, StoredLinear],
    errors: GroupErrors,
) -> list[LayerReport]:
    """Of the layers of a quantized group.

    Args:
        block: to which the group belongs; its layers' weights are those before the transform.
        group: the group.
        sample: [tokens, input_size], some of the group's input.
        quantized: the same group.
        stored: what is written of each layer.
        errors: of the group.
    """
    weight = block.weight(group)
    curves: list[list[list[float]]] = [[], []]
    if stored[group.linears[0]].kind.spec.weight_bits < 8:
        curves = [
            [_curve(sample), _curve(quantized.input.transform(sample))],
            [_curve(weight), _curve(quantized.weight)],
        ]
    transform = quantized.input.transform
    factors = [len(f) for f in (transform.left, transform.right) if f is not None]
    sizes = block.output_sizes(group)
    return [
        LayerReport(
            f"{block.name}.{name}",
            stored[name].kind,
            [size, weight.shape[1]],
            stored[name].nbytes,
            before,
            after,
            quantized.input.clip if CLIP_RATIO in stored[name].tensors else None,
            factors,
            curves[0],
            curves[1],
            errors.fallback,
            group.note if transform.left is not None else "",
        )
        for name, size, before, after in zip(group.linears, sizes, errors.plain, errors.found, strict=True)
    ]


def _curve(matrix: Tensor) -> list[float]:
    """Largest magnitude of each column, in descending order, at `CURVE_POINTS` places, relative to their mean."""
    peaks = matrix.abs().amax(0).sort(descending=True).values
    places = torch.linspace(0, len(peaks) - 1, min(CURVE_POINTS, len(peaks)), device=peaks.device).round().long()
    return [round(v, 4) for v in (peaks[places] / peaks.mean().clamp_min(1e-30)).tolist()]
