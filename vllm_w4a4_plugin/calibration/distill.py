# SPDX-License-Identifier: Apache-2.0
"""Training of a quantized model, as a whole, towards the float model's predictions.

The loss is the Kullback-Leibler divergence of the next-token distributions. Trained are row scales, activation clips,
norms and both factors of every transform, all by relative steps: entries differ by orders of magnitude. Codes stay, and
so a changed factor changes the effective weight, codes times T^-1, as well as the basis in which activations are
rounded. (Codes trained through their rounding flip at random in the few steps that are affordable, which undoes what
rounding under the Hessian gained.) The whole model is in memory in float32.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vllm_w4a4_plugin.checkpoint import QuantType

from .files import save_bytes, save_tensors
from .kronecker import apply_kronecker
from .model import StreamedModel
from .progress import Listener, Phase, Progress, silent

DEFAULT_STEPS = 16  # for models whose blocks hold at most DEFAULT_UP_TO parameters: a minute or two, 3 GB at most
DEFAULT_UP_TO = 300_000_000
STEP_TOKENS = 256  # longer rows of text are cut; a step costs in proportion
RATES = {"log_scale": 1e-3, "log_clip": 2e-3, "left_change": 5e-4, "right_change": 5e-4, "original": 1e-3}
"""Largest step of each kind of parameter, by the last part of its name; all are relative changes. `original` is
`torch.nn.utils.parametrize`'s name for what stands behind a norm's weight."""
BETAS = (0.9, 0.95)  # a run has few steps: the second moment must forget fast
WARM_UP = 0.25  # of all steps
LEAST_CLIP = 1e-3
STEPS_KEPT = 32  # an interruption loses at most so many


@dataclass
class QuantizedBlock:
    """What distillation starts from and ends with.

    Attributes:
        tensors: as stored, by full name. types: quant type by full name of the tensor.
        groups: linear layers, by their names in the block, that share an activation clip.
    """

    tensors: dict[str, Tensor]
    types: Mapping[str, QuantType]
    groups: Sequence[Sequence[str]]


def distill(
    model: StreamedModel,
    ids: Tensor,
    blocks: Sequence[QuantizedBlock],
    steps: int,
    seed: int,
    work: Path,
    listener: Listener = silent,
) -> Iterator[dict[str, Tensor]]:
    """Train, then give each block's tensors as they are to be stored.

    Args:
        model: the float model, teacher and frame of the student.
        ids: tokens [rows, length] to train on; one row, or a part of `STEP_TOKENS` tokens at most, is one step.
        blocks: all of them.
        steps: how many. seed: of the order of parts; none is used again before all have been.
        work: directory for the teacher's output and the state every `STEPS_KEPT` steps, from which an interrupted run
            goes on.
        listener: told of every step.
    """
    ids = shorter_rows(ids, STEP_TOKENS)
    orders = [
        torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed * 1009 + epoch))
        for epoch in range(-(-steps // len(ids)))
    ]
    rows = torch.cat(orders)[:steps]
    used, rows = rows.unique(return_inverse=True)
    ids = ids[used]  # the float model runs on no more than what is trained on
    teacher = _teacher(model, ids, work / "teacher.safetensors", listener)
    modules = [_student_block(model, index, block) for index, block in enumerate(blocks)]
    optimizer = _optimizer(modules)
    state_file, first = work / "distillation.pt", 0
    if state_file.exists():
        first = _load_state(state_file, modules, optimizer)
    for step in range(first, steps):
        listener(Progress(Phase.DISTILLING, step, steps))
        row = rows[step : step + 1]
        _set_rate(optimizer, step, steps)
        loss = _divergence(model, modules, ids[row], teacher[row])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % STEPS_KEPT == 0 or step + 1 == steps:
            _save_state(state_file, modules, optimizer, step + 1)
    listener(Progress(Phase.DISTILLING, steps, steps))
    for index, (module, block) in enumerate(zip(modules, blocks, strict=True)):
        yield _stored(module, block, model.block_name(index))


def shorter_rows(ids: Tensor, length: int) -> Tensor:
    """Rows of at most `length` tokens, all equally long, cut from rows [rows, n]."""
    parts = -(-ids.shape[1] // length)
    length = ids.shape[1] // parts
    return ids[:, : parts * length].reshape(-1, length)


class TrainableLinear(nn.Module):
    """A quantized linear layer of which all but the codes can be trained.

    The parameters are relative changes, zero at first: scale exp(log_scale), clip exp(log_clip), L (1 + left_change),
    R (1 + right_change).

    Args:
        tensors: by suffix, as stored. bits: of codes and activations.
        bias: [out] or None.
    """

    def __init__(self, tensors: Mapping[str, Tensor], bits: int, bias: Tensor | None) -> None:
        super().__init__()
        self.bits, self.bias = bits, bias
        self.codes, self.scale = tensors["weight"].float(), tensors["weight_scale"]
        self.left, self.right = tensors.get("left_trans"), tensors.get("right_trans")
        self.clip = tensors.get("clip_ratio")
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale))
        self.log_clip, self.left_change, self.right_change = (
            None if t is None else nn.Parameter(torch.zeros_like(t)) for t in (self.clip, self.left, self.right)
        )

    def share_with(self, other: "TrainableLinear") -> None:
        """Train one clip and one transform for both: the layers are computed as one matrix product."""
        self.log_clip, self.left_change, self.right_change = other.log_clip, other.left_change, other.right_change

    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """L and R as they are now."""
        return _changed(self.left, self.left_change), _changed(self.right, self.right_change)

    def clip_ratio(self) -> Tensor | None:
        """The activation clip as it is now."""
        if self.clip is None or self.log_clip is None:
            return None
        return (self.clip * self.log_clip.exp()).clamp(LEAST_CLIP, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        top = 2 ** (self.bits - 1) - 1
        x = apply_kronecker(x, *self.factors())
        scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny * 1e8) / top
        clip = self.clip_ratio()
        if clip is not None:
            scale = scale * clip
        x = _round(x / scale).clamp(-top - 1, top) * scale
        y = nn.functional.linear(x, self.codes) * (self.scale * self.log_scale.exp()).flatten()
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """What training changed, by suffix, as stored."""
        left, right = self.factors()
        scale = self.scale * self.log_scale.exp()
        named = {"weight_scale": scale, "clip_ratio": self.clip_ratio(), "left_trans": left, "right_trans": right}
        return {suffix: tensor.cpu().contiguous() for suffix, tensor in named.items() if tensor is not None}


class RelativeWeight(nn.Module):
    """Parametrization of a norm's weight by the logarithm of its change, rounded to the stored dtype.

    Args:
        start: [n], as stored, whose dtype is kept.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.start, self.dtype = start.float(), start.dtype

    def forward(self, log_change: Tensor) -> Tensor:
        """The weight [n]."""
        weight = self.start * log_change.exp()
        return weight + (weight.to(self.dtype).to(weight) - weight).detach()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """No change, whatever the weight was."""
        return torch.zeros_like(weight)


def _changed(factor: Tensor | None, change: Tensor | None) -> Tensor | None:
    return None if factor is None or change is None else factor + factor @ change


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def _teacher(model: StreamedModel, ids: Tensor, file: Path, listener: Listener) -> Tensor:
    """The float model's last hidden states [rows, length, hidden]; its logits would be too large to keep."""
    if not file.exists():
        hidden, _ = model.start(ids)
        with torch.no_grad():
            for index in range(len(model)):
                listener(Progress(Phase.TEACHER, index, len(model)))
                block = model.load_block(index)
                hidden = torch.cat([model.run_block(block, index, row[None].to(model.device)).cpu() for row in hidden])
        save_tensors({"hidden": hidden}, file)
        listener(Progress(Phase.TEACHER, len(model), len(model)))
    return load_file(file)["hidden"]


def _student_block(model: StreamedModel, index: int, quantized: QuantizedBlock) -> nn.Module:
    """Block `index` with the quantized tensors; what is trained requires gradients."""
    block, name = model.load_block(index), model.block_name(index)
    for local, parameter in list(block.named_parameters()):
        tensor = quantized.tensors.get(f"{name}.{local}")
        if tensor is None or tensor.dtype == torch.int8:
            continue
        parameter.data = tensor.to(parameter)
        owner, _, leaf = local.rpartition(".")
        if parameter.ndim == 1 and leaf == "weight":
            start = RelativeWeight(tensor.to(model.device))
            parametrize.register_parametrization(block.get_submodule(owner), leaf, start)
            block.get_parameter(f"{owner}.parametrizations.{leaf}.original").requires_grad_(True)
    for local, module in list(block.named_modules()):
        kind = quantized.types.get(f"{name}.{local}.weight", QuantType.FLOAT)
        if isinstance(module, nn.Linear) and kind is not QuantType.FLOAT:
            prefix = f"{name}.{local}."
            tensors = {
                full.removeprefix(prefix): tensor.to(model.device)
                for full, tensor in quantized.tensors.items()
                if full.startswith(prefix)
            }
            block.set_submodule(local, TrainableLinear(tensors, 4 if kind.is_w4a4 else 8, module.bias))
    for group in quantized.groups:
        members = [m for m in map(block.get_submodule, group) if isinstance(m, TrainableLinear)]
        for member in members[1:]:
            if member.left is not None or member.right is not None:
                member.share_with(members[0])
    return block


def _optimizer(modules: Sequence[nn.Module]) -> torch.optim.Optimizer:
    kinds: dict[str, list[nn.Parameter]] = {}
    for block in modules:
        for name, parameter in block.named_parameters():
            if parameter.requires_grad:
                kinds.setdefault(name.rpartition(".")[2], []).append(parameter)
    groups = [{"params": members, "lr": RATES[kind], "rate": RATES[kind]} for kind, members in kinds.items()]
    return torch.optim.Adam(groups, betas=BETAS, foreach=True)


def _set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Linear warm-up, then a cosine to zero."""
    factor = min(1.0, (step + 1) / max(1.0, WARM_UP * steps)) * (1 + cos(pi * step / steps)) / 2
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor


def _divergence(model: StreamedModel, modules: Sequence[nn.Module], ids: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = model.logits(teacher.to(model.device)).log_softmax(-1)
    hidden, _ = model.start(ids)
    for index, block in enumerate(modules):
        hidden = model.run_block(block, index, hidden)
    found = model.logits(hidden).log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


def _stored(module: nn.Module, block: QuantizedBlock, name: str) -> dict[str, Tensor]:
    tensors = dict(block.tensors)
    for local, part in module.named_modules():
        if isinstance(part, TrainableLinear):
            tensors |= {f"{name}.{local}.{suffix}": tensor for suffix, tensor in part.stored().items()}
        elif parametrize.is_parametrized(part, "weight"):
            full = f"{name}.{local}.weight"
            assert isinstance(part.weight, Tensor)
            tensors[full] = part.weight.detach().to("cpu", tensors[full].dtype)
    return tensors


def _save_state(file: Path, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, steps: int) -> None:
    trained = [[p.detach() for p in block.parameters() if p.requires_grad] for block in modules]
    state = io.BytesIO()
    torch.save({"trained": trained, "optimizer": optimizer.state_dict(), "steps": steps}, state)
    save_bytes(state.getvalue(), file)


def _load_state(file: Path, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> int:
    state = torch.load(file, weights_only=True)
    for block, values in zip(modules, state["trained"], strict=True):
        for parameter, value in zip((p for p in block.parameters() if p.requires_grad), values, strict=True):
            parameter.data.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return state["steps"]
