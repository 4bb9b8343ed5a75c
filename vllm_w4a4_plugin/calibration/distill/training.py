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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..data.held_out import CalibrationText
from ..files import save_bytes, save_tensors
from ..model.streamed import StreamedModel
from ..progress import Listener, Phase, Progress, silent
from .schedule import RATES, STEP_TOKENS, Schedule, shorter_rows
from .student import QuantizedBlock, StudentBlock

BETAS = (0.9, 0.95)  # a run has few steps: the second moment must forget fast
STEPS_KEPT = 32  # an interruption loses at most so many
JUDGED_ROWS = 8  # of held-out text, at most


@dataclass(frozen=True)
class Distilled:
    """A trained model.

    Attributes:
        start, end: divergence on held-out text before and after training; None if no text is held out.
        blocks: each block's tensors as they are to be stored: those from before training unless it helped.
    """

    start: float | None
    end: float | None
    blocks: Iterator[dict[str, Tensor]]

    @property
    def helped(self) -> bool:
        """Whether training is known to have helped, or cannot be judged."""
        return self.start is None or self.end is None or self.end < self.start


def distill(
    model: StreamedModel,
    text: CalibrationText,
    blocks: Sequence[QuantizedBlock],
    schedule: Schedule,
    work: Path,
    listener: Listener = silent,
) -> Distilled:
    """Train, and keep the result if its predictions for held-out text are better than those from before.

    Args:
        model: the float model: the teacher, and the frame of the student.
        text: tokens to train on, and held-out ones; one step takes one row, cut to at most `STEP_TOKENS` tokens.
        blocks: all of them.
        schedule: number of steps and order of rows.
        work: directory for the teacher's output, and for the state every `STEPS_KEPT` steps, from which an
            interrupted run continues.
        listener: told of every step.
    """
    ids = shorter_rows(text.rows, STEP_TOKENS)
    rows = schedule.rows(len(ids))
    used, rows = rows.unique(return_inverse=True)
    held_out = _some(shorter_rows(text.held_out, STEP_TOKENS))
    ids = torch.cat([ids[used], held_out])  # the float model runs only on what is used
    teacher = _teacher(model, ids, work / "teacher.safetensors", listener)
    judged = slice(len(used), None)
    students = [StudentBlock(model, index, block) for index, block in enumerate(blocks)]
    optimizer = _optimizer(students)
    state_file = work / "distillation.pt"
    if state_file.exists():
        first, start = _load_state(state_file, students, optimizer)
    else:
        first, start = 0, _mean_divergence(model, students, ids[judged], teacher[judged])
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
            _save_state(state_file, students, optimizer, step + 1, start)
    end = _mean_divergence(model, students, ids[judged], teacher[judged])
    listener(Progress(Phase.DISTILLING, schedule.steps, schedule.steps))
    result = Distilled(start, end, iter(()))
    tensors = (student.stored() if result.helped else student.quantized.tensors for student in students)
    return replace(result, blocks=tensors)


def _some(rows: Tensor) -> Tensor:
    """At most `JUDGED_ROWS` of rows [rows, length], at even distances."""
    return rows[:: max(1, -(-len(rows) // JUDGED_ROWS))]


def _mean_divergence(
    model: StreamedModel, students: Sequence[StudentBlock], ids: Tensor, teacher: Tensor
) -> float | None:
    """`_divergence` over rows [rows, length], one at a time; None if there are none."""
    if not len(ids):
        return None
    with torch.no_grad():
        parts = zip(ids.split(1), teacher.split(1), strict=True)
        return sum(_divergence(model, students, row, wanted).item() for row, wanted in parts) / len(ids)


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


def _save_state(
    file: Path, students: Sequence[StudentBlock], optimizer: torch.optim.Optimizer, steps: int, start: float | None
) -> None:
    trained = [[parameter.detach() for parameter in student.trained()] for student in students]
    state = io.BytesIO()
    values = {"trained": trained, "optimizer": optimizer.state_dict(), "steps": steps, "start": start}
    torch.save(values, state)
    save_bytes(state.getvalue(), file)


def _load_state(
    file: Path, students: Sequence[StudentBlock], optimizer: torch.optim.Optimizer
) -> tuple[int, float | None]:
    """Restore what `_save_state` wrote; returns the number of steps done and the divergence at the start."""
    state = torch.load(file, weights_only=True)
    for student, values in zip(students, state["trained"], strict=True):
        for parameter, value in zip(student.trained(), values, strict=True):
            parameter.data.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return state["steps"], state["start"]
