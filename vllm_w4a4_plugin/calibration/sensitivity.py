# SPDX-License-Identifier: Apache-2.0
"""How much an error at each token and at each output row of each layer changes the model's loss.

Squared gradients of the loss with respect to the layers' outputs (the diagonal of the empirical Fisher information),
computed block by block: one forward pass that keeps every block's input, then the blocks backwards, each recomputed.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .files import save_tensors
from .model import StreamedModel
from .progress import Listener, Phase, Progress
from .structure import Group, Role

ROWS_AT_ONCE = 2
LARGEST_WEIGHT = 20.0  # of the mean: no token may outweigh the rest


def measure(model: StreamedModel, ids: Tensor, directory: Path, listener: Listener) -> None:
    """Write `sensitivity_file(directory, i)` for every block; finished blocks of an earlier run are kept."""
    hidden, _ = model.start(ids)
    missing = [i for i in range(len(model)) if not sensitivity_file(directory, i).exists()]
    if not missing:
        return
    last = missing[-1]
    needs_loss = last == len(model) - 1
    for index in range(last + 1):
        file = _float_file(directory, index)
        if file.exists():
            hidden = load_file(file)["hidden"]
        else:
            save_tensors({"hidden": hidden}, file)
        if (index == last and needs_loss) or (index < last and not _float_file(directory, index + 1).exists()):
            block = model.load_block(index)
            with torch.no_grad():
                rows = [model.run_block(block, index, h.to(model.device)).cpu() for h in hidden.split(ROWS_AT_ONCE)]
            hidden = torch.cat(rows)
        listener(Progress(Phase.GRADIENTS_FORWARD, index + 1, last + 1))
    if needs_loss:
        gradient = _loss_gradient(model, hidden, ids)
    else:
        gradient = load_file(_gradient_file(directory, last + 1))["gradient"]
    for index in reversed(missing):
        block = model.load_block(index)
        hidden = load_file(_float_file(directory, index))["hidden"]
        tokens, weights, gradient = _backward(model, block, index, model.groups[index], hidden, gradient)
        result = {f"tokens.{role}": value for role, value in tokens.items()}
        result |= {f"rows.{role}": value for role, value in weights.items()}
        save_tensors({"gradient": gradient}, _gradient_file(directory, index))
        save_tensors(result, sensitivity_file(directory, index))
        _gradient_file(directory, index + 1).unlink(missing_ok=True)
        _float_file(directory, index).unlink()
        listener(Progress(Phase.GRADIENTS_BACKWARD, last + 1 - index, last + 1))
    _gradient_file(directory, 0).unlink()


def sensitivity_file(directory: Path, index: int) -> Path:
    """Where block `index`'s token and row weights lie."""
    return directory / f"sensitivity-{index:05d}.safetensors"


def _float_file(directory: Path, index: int) -> Path:
    return directory / f"float-{index:05d}.safetensors"


def _gradient_file(directory: Path, index: int) -> Path:
    return directory / f"gradient-{index:05d}.safetensors"


def load(directory: Path, index: int, role: Role) -> tuple[Tensor, Tensor]:
    """Weights of the tokens [tokens] and of the output rows [out], both with mean 1."""
    data = load_file(sensitivity_file(directory, index))
    tokens = data[f"tokens.{role}"]
    tokens = (tokens / tokens.mean()).clamp_max(LARGEST_WEIGHT)
    rows = data[f"rows.{role}"]
    return tokens / tokens.mean(), rows / rows.mean().clamp_min(1e-30)


def _loss_gradient(model: StreamedModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """Gradient of the summed next-token loss with respect to the last block's output."""
    gradients = []
    for h, row in zip(hidden, ids, strict=True):
        h = h[None].to(model.device).requires_grad_(True)
        logits = model.logits(h)[0, :-1]
        loss = nn.functional.cross_entropy(logits, row[1:].to(model.device), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, h)
        gradients.append(gradient.cpu())
    return torch.cat(gradients)


def _backward(
    model: StreamedModel, block: nn.Module, index: int, groups: dict[Role, Group], hidden: Tensor, gradient: Tensor
) -> tuple[dict[Role, Tensor], dict[Role, Tensor], Tensor]:
    tokens: dict[Role, list[Tensor]] = {role: [] for role in groups}
    rows: dict[Role, Tensor] = {}
    inputs = []
    for h, g in zip(hidden.split(ROWS_AT_ONCE), gradient.split(ROWS_AT_ONCE), strict=True):
        outputs: dict[str, Tensor] = {}
        hooks = [
            block.get_submodule(name).register_forward_hook(_keep(outputs, name))
            for group in groups.values()
            for name in group.linears
        ]
        h = h.to(model.device).requires_grad_(True)
        out = model.run_block(block, index, h)
        for hook in hooks:
            hook.remove()
        names = list(outputs)
        grads = torch.autograd.grad(out, [h, *(outputs[n] for n in names)], g.to(model.device))
        inputs.append(grads[0].cpu())
        by_name = dict(zip(names, grads[1:], strict=True))
        for role, group in groups.items():
            squared = torch.cat([by_name[n].flatten(0, 1) for n in group.linears], 1).square_()
            tokens[role].append(squared.sum(1).cpu())
            rows[role] = rows.get(role, torch.zeros(())) + squared.sum(0).cpu()
    return {role: torch.cat(parts) for role, parts in tokens.items()}, rows, torch.cat(inputs)


def _keep(outputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, args: object, output: Tensor) -> None:
        outputs[name] = output

    return hook
