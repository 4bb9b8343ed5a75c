# SPDX-License-Identifier: Apache-2.0
"""How much an error at each token changes the model's loss: the diagonal of the empirical Fisher information.

For each group of linear layers, the squared gradient of the loss with respect to its output, summed over the output's
channels. It is computed block by block: a forward pass that stores every block's input, then a backward pass in which
each block is run again.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .files import save_tensors
from .model.block import LoadedBlock
from .model.hooks import hooked
from .model.streamed import StreamedModel
from .progress import Listener, Phase, Progress

ROWS_AT_ONCE = 2
LARGEST_WEIGHT = 20.0  # of the mean: no token may outweigh the rest


def measure(model: StreamedModel, ids: Tensor, directory: Path, listener: Listener) -> None:
    """Write `fisher_file(directory, index)` for every block; files of an interrupted run are kept.

    Args:
        model: the float model.
        ids: tokens [rows, length].
        directory: for the results, and for intermediate files that are removed at the end.
        listener: told of every block.
    """
    hidden, _ = model.start(ids)
    missing = [i for i in range(len(model)) if not fisher_file(directory, i).exists()]
    if not missing:
        return
    last = missing[-1]
    hidden = _forward(model, hidden, last, directory, listener)
    if last == len(model) - 1:
        gradient = _loss_gradient(model, hidden, ids)
    else:
        gradient = load_file(_gradient_file(directory, last + 1))["gradient"]
    for index in reversed(missing):
        hidden = load_file(_input_file(directory, index))["hidden"]
        tokens, gradient = _backward(LoadedBlock(model, index), hidden, gradient)
        save_tensors({"gradient": gradient}, _gradient_file(directory, index))
        save_tensors(tokens, fisher_file(directory, index))
        _gradient_file(directory, index + 1).unlink(missing_ok=True)
        _input_file(directory, index).unlink()
        listener(Progress(Phase.GRADIENTS_BACKWARD, last + 1 - index, last + 1))
    _gradient_file(directory, 0).unlink()


def token_weights(directory: Path, index: int, key: str) -> Tensor:
    """Weights [tokens] of the errors in a group's output, with mean 1.

    Args:
        directory: which `measure` wrote to.
        index: of the block.
        key: of the group.
    """
    tokens = load_file(fisher_file(directory, index))[key]
    if not tokens.any():  # nothing here changes the loss
        return torch.ones_like(tokens)
    tokens = (tokens / tokens.mean()).clamp_max(LARGEST_WEIGHT)
    return tokens / tokens.mean()


def fisher_file(directory: Path, index: int) -> Path:
    """The file with the squared gradients of block `index`, one tensor [tokens] per group."""
    return directory / f"fisher-{index:05d}.safetensors"


def _input_file(directory: Path, index: int) -> Path:
    return directory / f"float-{index:05d}.safetensors"


def _gradient_file(directory: Path, index: int) -> Path:
    return directory / f"gradient-{index:05d}.safetensors"


def _forward(model: StreamedModel, hidden: Tensor, last: int, directory: Path, listener: Listener) -> Tensor:
    """Store the input of every block up to `last`; returns that block's output if the loss follows it."""
    for index in range(last + 1):
        file = _input_file(directory, index)
        if file.exists():
            hidden = load_file(file)["hidden"]
        else:
            save_tensors({"hidden": hidden}, file)
        feeds_loss = index == len(model) - 1
        feeds_block = index < last and not _input_file(directory, index + 1).exists()
        if feeds_loss or feeds_block:
            block = model.load_block(index)
            with torch.no_grad():
                rows = [model.run_block(block, index, h.to(model.device)).cpu() for h in hidden.split(ROWS_AT_ONCE)]
            hidden = torch.cat(rows)
        listener(Progress(Phase.GRADIENTS_FORWARD, index + 1, last + 1))
    return hidden


def _loss_gradient(model: StreamedModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """Gradient of the summed next-token loss with respect to the last block's output [rows, length, hidden]."""
    gradients = []
    for h, row in zip(hidden, ids, strict=True):
        h = h[None].to(model.device).requires_grad_(True)
        logits = model.logits(h)[0, :-1]
        loss = nn.functional.cross_entropy(logits, row[1:].to(model.device), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, h)
        gradients.append(gradient.cpu())
    return torch.cat(gradients)


def _backward(block: LoadedBlock, hidden: Tensor, gradient: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Squared gradients [tokens] of each group's output, and the gradient of the block's input.

    Args:
        block: to run again.
        hidden: its input [rows, length, hidden].
        gradient: of its output, of the same shape.
    """
    tokens: dict[str, list[Tensor]] = {key: [] for key in block.groups}
    inputs = []
    for h, g in zip(hidden.split(ROWS_AT_ONCE), gradient.split(ROWS_AT_ONCE), strict=True):
        outputs: dict[str, Tensor] = {}
        hooks = [
            block.linear(name).register_forward_hook(_keep(outputs, name))
            for group in block.groups.values()
            for name in group.linears
        ]
        h = h.to(block.device).requires_grad_(True)
        with hooked(*hooks):
            out = block.run(h)
        names = list(outputs)
        grads = torch.autograd.grad(out, [h, *(outputs[n] for n in names)], g.to(block.device))
        inputs.append(grads[0].cpu())
        by_name = dict(zip(names, grads[1:], strict=True))
        for key, group in block.groups.items():
            squared = torch.cat([by_name[n].flatten(0, -2) for n in group.linears], 1).square_()
            tokens[key].append(squared.sum(1).cpu())
    return {key: torch.cat(parts) for key, parts in tokens.items()}, torch.cat(inputs)


def _keep(outputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, args: object, output: Tensor) -> None:
        outputs[name] = output

    return hook
