# SPDX-License-Identifier: Apache-2.0
"""Quantization of one decoder block, group by group, each fed with the quantized outputs of those before it."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from vllm_w4a4_plugin.checkpoint import QuantType

from .activations import Activations
from .geometry import Transform, closed_form
from .kronecker import FactorSizes, apply_kronecker, factor_sizes, kronecker_inverse
from .model import StreamedModel
from .rounding import (
    best_activation_clip,
    best_weight_scale,
    descend,
    gptq,
    quantize_tokens,
    refit,
    round_codes,
    row_scale,
)
from .structure import Group, Role, head_dim, linear
from .team import Team

ROWS_AT_ONCE = 4
TOKENS_AT_ONCE = 4096
ROWS_IN_FLOAT64 = 2048
CLIP_TOKENS = 2048
LOSS_ROWS = 2
REPORT_TOKENS = 512
CURVE_POINTS = 64

Weights = Callable[[Role], tuple[Tensor, Tensor] | None]


@dataclass
class LayerReport:
    """What the user is told of one linear layer.

    Attributes:
        name: full module name; quant_type: as written; shape: [out, in].
        before, after: |error| / |output| of rounding to nearest without a transform, and as quantized here.
        clip: activation clip ratio, None where there is none. factors: sizes of L and R.
        nbytes: of all its tensors.
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


@dataclass
class BlockResult:
    """A quantized block.

    Attributes:
        tensors: name -> tensor as stored; types: name -> quant type, in the same order.
        hidden: the quantized block's output [rows, length, hidden], float32.
        reports: per linear layer. loss: relative error of what the block adds to the residual stream.
    """

    tensors: dict[str, Tensor]
    types: dict[str, QuantType]
    hidden: Tensor
    reports: list[LayerReport]
    loss: float


@dataclass
class Quantized:
    """One group's quantized weights, and how its input is quantized.

    Attributes:
        bits: of weights and activations. codes: [out, n] integers as floats; scale: [out, 1].
        weight: [out, n], what the codes stand for, transformed.
        clip: activation clip ratio. diagonal: [n]; left, right: factors; None is the identity.
    """

    bits: int
    codes: Tensor
    scale: Tensor
    weight: Tensor
    clip: float = 1.0
    diagonal: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def transformed(self, x: Tensor) -> Tensor:
        """(x * diagonal) kron(left, right) of tokens [tokens, n]."""
        return apply_kronecker(x if self.diagonal is None else x * self.diagonal, self.left, self.right)

    def on(self, device: torch.device) -> "Quantized":
        """The same, with what quantizes tokens on another device."""
        diagonal, left, right = (None if t is None else t.to(device) for t in (self.diagonal, self.left, self.right))
        return replace(self, diagonal=diagonal, left=left, right=right)

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens [tokens, n] as the quantized layer sees them."""
        return quantize_tokens(self.transformed(x), self.clip, self.bits)


class BlockQuantizer:
    """Quantizes one block.

    Args:
        model: the block comes from it.
        index: which block.
        block: loaded; changed in place.
        groups: of the block. types: quant type per role.
        hidden: its input [rows, length, hidden].
        seed: of the flat rotations.
        weights: token and row weights of a role, or None for equal ones.
        activations: where they live. team: devices that share the work, by default the model's alone.
    """

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        block: nn.Module,
        groups: Mapping[Role, Group],
        types: Mapping[Role, QuantType],
        hidden: Tensor,
        seed: int,
        weights: Weights = lambda role: None,
        activations: Activations | None = None,
        team: Team | None = None,
    ) -> None:
        self.model, self.index, self.block, self.groups, self.types = model, index, block, groups, types
        self.name, self.hidden, self.seed, self.weights = model.block_name(index), hidden, seed, weights
        self.activations, self.team = activations or Activations(), team or Team([model.device])
        self.replays: dict[str, Tensor] = {}
        self.written: dict[str, tuple[Tensor, QuantType]] = {}
        self.reports: list[LayerReport] = []

    @torch.no_grad()
    def run(self, progress: Callable[[str], None] = lambda step: None) -> BlockResult:
        """Quantize the groups in the order of execution."""
        sample = slice(None, None, max(1, len(self.hidden) // LOSS_ROWS))
        first = self.hidden[sample].to(self.model.device)
        exact = (self.model.run_block(self.block, self.index, first) - first).cpu()
        for role in (Role.O, Role.DOWN):
            if self.types[role] is not QuantType.FLOAT:
                self._prepare_source(self.groups[role])
        for role, group in self.groups.items():
            progress(f"{role}")
            if self.types[role] is QuantType.FLOAT:
                self._keep_float(group)
            else:
                self._quantize(group)
        output = self._forward()
        loss = ((output[sample] - self.hidden[sample] - exact).norm() / exact.norm()).item()
        tensors, types = self._collect()
        return BlockResult(tensors, types, output, self.reports, loss)

    def _forward(self, until: str | None = None) -> Tensor:
        """The block's output, or the input of linear `until`, for all rows; quantized layers give stored outputs."""
        replicas = [
            self.block if device == self.model.device else copy.deepcopy(self.block).to(device)
            for device in self.team.devices
        ]
        if len(set(map(id, replicas))) < len(replicas):  # a device named twice
            replicas = [copy.deepcopy(self.block) for _ in replicas]
        starts = range(0, len(self.hidden), ROWS_AT_ONCE)

        def run(start: int, member: int) -> Tensor:
            rows = self.hidden[start : start + ROWS_AT_ONCE].to(self.team.devices[member])
            stored = {name: self.replays[name][start : start + ROWS_AT_ONCE] for name in self.replays}
            with _replaying(replicas[member], stored, until):
                try:
                    return self.model.run_block(replicas[member], self.index, rows)
                except _Stopped as stopped:
                    return stopped.value

        results = torch.empty(0)
        for start, result in zip(starts, self.team.map(run, starts), strict=True):
            if not start:
                results = self.activations.empty(*self.hidden.shape[:2], result.shape[-1])
            results[start : start + len(result)] = result
        return results

    def _importance(self, role: Role, tokens: int, rows: int) -> tuple[Tensor, Tensor]:
        """Weights of the tokens [tokens] and of the output rows [rows]."""
        given = self.weights(role)
        if given is None:
            given = torch.ones(tokens), torch.ones(rows)
        return given[0].to(self.model.device), given[1].to(self.model.device)

    def _generator(self, role: Role) -> torch.Generator:
        number = (self.seed * 100_003 + self.index) * len(Role) + list(Role).index(role)
        return torch.Generator().manual_seed(number)

    def _input(self, group: Group) -> Tensor:
        """The group's input [tokens, n], where activations live."""
        return self._forward(group.linears[0]).flatten(0, 1)

    def _parts(self, x: Tensor) -> list[slice]:
        """Slices of the tokens that are worked on at once."""
        return [slice(start, start + TOKENS_AT_ONCE) for start in range(0, len(x), TOKENS_AT_ONCE)]

    def _products(self, x: Tensor, factors: Callable[[Tensor, slice], tuple[Tensor, ...]]) -> list[Tensor]:
        """Sums over all tokens of a' b, a' c, ... for (a, b, c, ...) = factors(x on some device, slice of tokens)."""
        sums: list[dict[int, Tensor]] = [{} for _ in self.team.devices]

        def add(part: slice, member: int) -> None:
            first, *others = factors(x[part].to(self.team.devices[member]), part)
            for i, other in enumerate(others):
                if i not in sums[member]:
                    sums[member][i] = torch.zeros(first.shape[1], other.shape[1], device=first.device)
                sums[member][i].addmm_(first.t(), other)

        for _ in self.team.map(add, self._parts(x)):
            pass
        results = list(sums[0].values())
        for found in sums[1:]:
            for result, other in zip(results, found.values(), strict=False):  # a member may have had no part
                result += other.to(result)
        return results

    def _input_moment(self, x: Tensor, tokens: Tensor) -> Tensor:
        """E[weight * x' x], [n, n]."""
        (moment,) = self._products(x, lambda chunk, part: (chunk * tokens[part, None].to(chunk), chunk))
        return moment.div_(len(x))

    def _weight(self, group: Group) -> Tensor:
        return torch.cat([linear(self.block, name).weight for name in group.linears])

    def _prepare_source(self, group: Group) -> None:
        """Fold the part of the transform of o or down that cannot be computed online into v or up."""
        flat = self.types[group.role] is QuantType.W4A4_FLATQUANT_DYNAMIC
        if group.source is None or not (flat or group.role is Role.DOWN):
            return
        source = linear(self.block, group.source)
        target = linear(self.block, group.linears[0])
        x = self._input(group)
        tokens, rows = self._importance(group.role, len(x), len(target.weight))
        features, produced = target.in_features, source.out_features
        if group.role is Role.DOWN:
            if flat:
                sx, sw = self._input_moment(x, tokens), _moment(target.weight, rows)
                diagonal = closed_form(sx, sw, factor_sizes(features), self._generator(group.role)).diagonal
            else:
                (energy,) = self._products(x, lambda chunk, part: (tokens[part, None].to(chunk), chunk.square()))
                energy = energy[0].div_(len(x))
                ratio = (target.weight.square() * rows[:, None]).sum(0) / energy.clamp_min(1e-12)
                diagonal = ratio.pow(0.25).clamp_min(1e-6).double().cpu()
                diagonal /= diagonal.log().mean().exp()
            scale = diagonal.to(source.weight)
            source.weight.mul_(scale[:, None])
            if source.bias is not None:
                source.bias.mul_(scale)
            target.weight.div_(scale)
        else:
            head = self._head_dim()
            heads, kv_heads = features // head, produced // head
            column = torch.arange(features)
            tied = column // head // (heads // kv_heads) * head + column % head
            sx, sw = self._input_moment(x, tokens), _moment(target.weight, rows)
            transform = closed_form(sx, sw, FactorSizes(heads, head), self._generator(group.role), tied=tied)
            self._fold_heads(source, target, transform, tied, kv_heads, head)

    def _fold_heads(
        self, source: nn.Linear, target: nn.Linear, transform: Transform, tied: Tensor, kv_heads: int, head: int
    ) -> None:
        """v' = (v * d) R per head, and the inverse in o."""
        device = source.weight.device
        d = torch.empty(kv_heads * head, dtype=torch.float64)
        d[tied] = transform.diagonal
        right = transform.right.to(device)
        blocks = (source.weight.double() * d.to(device)[:, None]).reshape(kv_heads, head, -1)
        source.weight.copy_(torch.matmul(right.t(), blocks).reshape(source.weight.shape))
        if source.bias is not None:
            source.bias.copy_(((source.bias.double() * d.to(device)).reshape(kv_heads, head) @ right).flatten())
        weight = target.weight.double() / transform.diagonal.to(device)
        inverse = torch.linalg.inv(right).t().contiguous()
        target.weight.copy_(apply_kronecker(weight, None, inverse))

    def _head_dim(self) -> int:
        return head_dim(self.model.config.get_text_config())

    def _quantize(self, group: Group) -> None:
        kind = self.types[group.role]
        x, weight = self._input(group), self._weight(group)
        quantized = self._eight_bits(weight) if kind is QuantType.W8A8_DYNAMIC else self._four_bits(group, x, weight)
        outputs = [self.activations.empty(len(x), linear(self.block, name).out_features) for name in group.linears]
        products = [(quantized.codes * quantized.scale).t().to(device) for device in self.team.devices]

        def multiply(part: slice, member: int) -> Tensor:
            device = self.team.devices[member]
            return quantized.on(device).tokens(x[part].to(device)) @ products[member]

        for part, result in zip(self._parts(x), self.team.map(multiply, self._parts(x)), strict=True):
            for output, columns in zip(outputs, result.split([o.shape[1] for o in outputs], 1), strict=True):
                output[part] = columns
        for name, output in zip(group.linears, outputs, strict=True):
            bias = linear(self.block, name).bias
            if bias is not None:
                output += bias.to(output)
            self.replays[name] = output.view(*self.hidden.shape[:2], -1)
        self._finish(group, kind, quantized)
        self._report(group, kind, x, weight, quantized)

    def _eight_bits(self, weight: Tensor) -> Quantized:
        """Rounded to nearest: at 8 bits its error is far below everything else's."""
        scale = row_scale(weight, 8)
        return Quantized(8, round_codes(weight, scale, 8), scale, weight)

    def _four_bits(self, group: Group, x: Tensor, weight: Tensor) -> Quantized:
        tokens, rows = self._importance(group.role, len(x), len(weight))
        features = x.shape[1]
        left = right = None
        scale = torch.ones(features, device=self.model.device)
        if self.types[group.role] is QuantType.W4A4_FLATQUANT_DYNAMIC:
            folded = group.role is Role.O and group.source is not None
            sizes = FactorSizes(features // self._head_dim(), self._head_dim()) if folded else factor_sizes(features)
            transform = closed_form(
                self._input_moment(x, tokens),
                _moment(weight, rows),
                sizes,
                self._generator(group.role),
                fit_diagonal=group.norm is not None,
                fit_right=not folded,
            )
            left = transform.left.float().to(self.model.device)
            right = None if folded else transform.right.float().to(self.model.device)
            if group.norm:
                scale = self._fold_into_norm(group, transform.diagonal)
            inverse = kronecker_inverse(left, right)
            # In float64, a part at a time: float32 would cost the factors' condition number in digits.
            parts = [apply_kronecker((w / scale).double(), *inverse).float() for w in weight.split(ROWS_IN_FLOAT64)]
            weight = torch.cat(parts)
        result = Quantized(4, weight, scale, weight, 1.0, scale, left, right)
        if left is not None:
            some = slice(None, None, max(1, len(x) // CLIP_TOKENS))
            sample = result.transformed(x[some].to(self.model.device))
            clip = best_activation_clip(sample, _moment(weight, rows), tokens[some])
            result.clip = torch.tensor(clip, dtype=torch.float32).item()

        def rounded_and_exact(chunk: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
            exact = result.on(chunk.device).transformed(chunk)
            rounded = quantize_tokens(exact, result.clip)
            return rounded * (tokens[part].to(chunk) / len(x))[:, None], rounded, exact

        hessian, cross = self._products(x, rounded_and_exact)
        refitted = refit(weight, hessian, cross)
        del cross
        result.scale = best_weight_scale(refitted, hessian.diagonal())

        def round_rows(rows: tuple[Tensor, Tensor], member: int) -> Tensor:
            weight, scale, h = (t.to(self.team.devices[member]) for t in (*rows, hessian))
            return descend(gptq(weight, scale, h), weight, scale, h)

        shares = zip(refitted.chunk(len(self.team)), result.scale.chunk(len(self.team)), strict=True)
        result.codes = torch.cat([codes.to(weight) for codes in self.team.map(round_rows, shares)])
        return result

    def _fold_into_norm(self, group: Group, diagonal: Tensor) -> Tensor:
        """Multiply the norm's weight by the diagonal; returns the diagonal that its stored dtype leaves of it."""
        assert group.norm
        norm = self.block.get_submodule(group.norm)
        assert isinstance(norm.weight, Tensor)
        stored = self.model.tensors[f"{self.name}.{group.norm}.weight"]
        dtype = _TORCH_DTYPES[stored.dtype]
        new = (norm.weight * diagonal.to(norm.weight)).to(dtype).to(norm.weight.dtype)
        effective = torch.where(norm.weight == 0, torch.ones_like(new), new / norm.weight)
        effective = torch.where(effective == 0, torch.ones_like(new), effective)
        norm.weight.copy_(torch.where(norm.weight == 0, norm.weight, norm.weight * effective))
        return effective

    def _finish(self, group: Group, kind: QuantType, quantized: Quantized) -> None:
        """Keep the stored tensors of each layer of the group."""
        sizes = [linear(self.block, name).out_features for name in group.linears]
        parts = zip(group.linears, quantized.codes.split(sizes), quantized.scale.split(sizes), strict=True)
        for name, codes, scale in parts:
            tensors = {
                "weight": codes.to(torch.int8),
                "weight_scale": scale.float(),
                "weight_offset": torch.zeros_like(scale, dtype=torch.float32),
            }
            if kind is QuantType.W4A4_FLATQUANT_DYNAMIC:
                tensors["clip_ratio"] = torch.tensor([quantized.clip], dtype=torch.float32)
                if quantized.left is not None:
                    tensors["left_trans"] = quantized.left.clone()
                if quantized.right is not None:
                    tensors["right_trans"] = quantized.right.clone()
            for suffix, tensor in tensors.items():
                self.written[f"{self.name}.{name}.{suffix}"] = (tensor.cpu().contiguous(), kind)

    def _keep_float(self, group: Group) -> None:
        for name in group.linears:
            module = linear(self.block, name)
            size = (
                module.weight.numel() * _TORCH_DTYPES[self.model.tensors[f"{self.name}.{name}.weight"].dtype].itemsize
            )
            self.reports.append(LayerReport(f"{self.name}.{name}", QuantType.FLOAT, list(module.weight.shape), size))

    def _report(self, group: Group, kind: QuantType, x: Tensor, weight: Tensor, quantized: Quantized) -> None:
        sample = x[:: max(1, len(x) // REPORT_TOKENS)].to(self.model.device)
        bits = quantized.bits
        scale = row_scale(weight, bits)
        plain = quantize_tokens(sample, 1.0, bits) @ (round_codes(weight, scale, bits) * scale).t()
        exact, after = sample @ weight.t(), quantized.tokens(sample) @ (quantized.codes * quantized.scale).t()
        curves: list[list[list[float]]] = [[], []]
        if kind.is_w4a4:
            curves = [
                [_curve(sample), _curve(quantized.transformed(sample))],
                [_curve(weight), _curve(quantized.weight)],
            ]
        start = 0
        for name in group.linears:
            out = linear(self.block, name).out_features
            part = slice(start, start + out)
            start += out
            norm = exact[:, part].norm().clamp_min(1e-30)
            prefix = f"{self.name}.{name}."
            self.reports.append(
                LayerReport(
                    f"{self.name}.{name}",
                    kind,
                    [out, x.shape[1]],
                    sum(t.nbytes for n, (t, _) in self.written.items() if n.startswith(prefix)),
                    ((plain - exact)[:, part].norm() / norm).item(),
                    ((after - exact)[:, part].norm() / norm).item(),
                    quantized.clip if kind is QuantType.W4A4_FLATQUANT_DYNAMIC else None,
                    [len(f) for f in (quantized.left, quantized.right) if f is not None],
                    *curves,
                )
            )

    def _collect(self) -> tuple[dict[str, Tensor], dict[str, QuantType]]:
        """All tensors of the block: linear layers in the order of execution, then the rest as stored."""
        tensors: dict[str, Tensor] = {}
        types: dict[str, QuantType] = {}
        for group in self.groups.values():
            for name in group.linears:
                prefix = f"{self.name}.{name}."
                for full, (tensor, kind) in self.written.items():
                    if full.startswith(prefix):
                        tensors[full], types[full] = tensor, kind
        for full, info in self.model.tensors.items():
            local = full.removeprefix(self.name + ".")
            if local == full or full in tensors:
                continue
            owner, _, leaf = local.rpartition(".")
            value = getattr(self.block.get_submodule(owner), leaf)
            tensors[full], types[full] = value.detach().to("cpu", _TORCH_DTYPES[info.dtype]), QuantType.FLOAT
        return tensors, types


def _moment(matrix: Tensor, weights: Tensor) -> Tensor:
    """Sum over rows of weight * row' row."""
    return (matrix * weights[:, None]).t() @ matrix


@contextmanager
def _replaying(block: nn.Module, stored: Mapping[str, Tensor], until: str | None) -> Iterator[None]:
    """Inside, linear layers in `stored` give what is stored, and `until` raises `_Stopped` with its input."""
    modules = {name: block.get_submodule(name) for name in stored}
    forwards = {name: module.forward for name, module in modules.items()}
    hook = block.get_submodule(until).register_forward_pre_hook(_stop) if until else None
    try:
        for name, module in modules.items():
            module.forward = partial(_stored_output, stored[name])
        yield
    finally:
        for name, module in modules.items():
            module.forward = forwards[name]
        if hook:
            hook.remove()


def _stored_output(output: Tensor, x: Tensor) -> Tensor:
    return output.to(x)


class _Stopped(Exception):
    def __init__(self, value: Tensor) -> None:
        self.value = value


def _stop(module: nn.Module, args: tuple[Tensor]) -> None:
    raise _Stopped(args[0])


def _curve(matrix: Tensor) -> list[float]:
    """Largest magnitude per column, sorted downwards, at `CURVE_POINTS` places, relative to their mean."""
    peaks = matrix.abs().amax(0).sort(descending=True).values
    places = torch.linspace(0, len(peaks) - 1, min(CURVE_POINTS, len(peaks)), device=peaks.device).round().long()
    return [round(v, 4) for v in (peaks[places] / peaks.mean().clamp_min(1e-30)).tolist()]


_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
