# SPDX-License-Identifier: Apache-2.0
"""Training of a quantized model, as a whole, towards the float model's predictions.

The loss is the Kullback-Leibler divergence of the next-token distributions. Scales, activation clips, norms and both
factors of every transform are trained, all by relative steps, because their entries differ by orders of magnitude. The
codes are fixed, so a changed factor changes the effective weight, codes times T^-1, as well as the basis in which
activations are rounded. (Codes that are trained through their rounding flip at random in the few steps that are
affordable, which undoes what rounding under the Hessian gained.) The whole model is in memory in float32.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..files import save_bytes, save_tensors
from ..model.streamed import StreamedModel
from ..progress import Listener, Phase, Progress, silent
from .schedule import RATES, STEP_TOKENS, Schedule, shorter_rows
from .student import QuantizedBlock, StudentBlock

BETAS = (0.9, 0.95)  # a run has few steps: the second moment must forget fast
STEPS_KEPT = 32  # an interruption loses at most so many


def distill(
    model: StreamedModel,
    ids: Tensor,
    blocks: Sequence[QuantizedBlock],
    schedule: Schedule,
    work: Path,
    listener: Listener = silent,
) -> Iterator[dict[str, Tensor]]:
    """Train, then yield each block's tensors as they are to be stored.

    Args:
        model: the float model: the teacher, and the frame of the student.
        ids: tokens [rows, length] to train on; one step takes one row, cut to at most `STEP_TOKENS` tokens.
        blocks: all of them.
        schedule: number of steps and order of rows.
        work: directory for the teacher's output, and for the state every `STEPS_KEPT` steps, from which an
            interrupted run continues.
        listener: told of every step.
    """
    ids = shorter_rows(ids, STEP_TOKENS)
    rows = schedule.rows(len(ids))
    used, rows = rows.unique(return_inverse=True)
    ids = ids[used]  # the float model runs only on what is trained on
    teacher = _teacher(model, ids, work / "teacher.safetensors", listener)
    students = [StudentBlock(model, index, block) for index, block in enumerate(blocks)]
    optimizer = _optimizer(students)
    state_file, first = work / "distillation.pt", 0
    if state_file.exists():
        first = _load_state(state_file, students, optimizer)
    for step in range(first, schedule.steps):
        listener(Progress(Phase.DISTILLING, step, schedule.steps))
        row = rows[step : step + 1]
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * schedule.factor(step)
        loss = _divergence(model, students, ids[row], teacher[row])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % STEPS_KEPT == 0 or step + 1 == schedule.steps:
            _save_state(state_file, students, optimizer, step + 1)
    listener(Progress(Phase.DISTILLING, schedule.steps, schedule.steps))
    for student in students:
        yield student.stored()


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


def _optimizer(students: Sequence[StudentBlock]) -> torch.optim.Optimizer:
    """Adam with a rate for each kind of parameter."""
    kinds: dict[str, list[nn.Parameter]] = {}
    for student in students:
        for name, parameter in student.module.named_parameters():
            if parameter.requires_grad:
                kinds.setdefault(name.rpartition(".")[2], []).append(parameter)
    groups = [{"params": members, "lr": RATES[kind], "rate": RATES[kind]} for kind, members in kinds.items()]
    return torch.optim.Adam(groups, betas=BETAS, foreach=True)


def _divergence(model: StreamedModel, students: Sequence[StudentBlock], ids: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL divergence of the student's predictions for ids [rows, length] from the teacher's."""
    with torch.no_grad():
        wanted = model.logits(teacher.to(model.device)).log_softmax(-1)
    hidden, _ = model.start(ids)
    for index, student in enumerate(students):
        hidden = model.run_block(student.module, index, hidden)
    found = model.logits(hidden).log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


def _save_state(file: Path, students: Sequence[StudentBlock], optimizer: torch.optim.Optimizer, steps: int) -> None:
    trained = [[parameter.detach() for parameter in student.trained()] for student in students]
    state = io.BytesIO()
    torch.save({"trained": trained, "optimizer": optimizer.state_dict(), "steps": steps}, state)
    save_bytes(state.getvalue(), file)


def _load_state(file: Path, students: Sequence[StudentBlock], optimizer: torch.optim.Optimizer) -> int:
    """Restore what `_save_state` wrote; returns the number of steps done."""
    state = torch.load(file, weights_only=True)
    for student, values in zip(students, state["trained"], strict=True):
        for parameter, value in zip(student.trained(), values, strict=True):
            parameter.data.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return state["steps"]
