# SPDX-License-Identifier: Apache-2.0
"""One evaluation: a model alone, or next to its float model, each of which is started once."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp
from pathlib import Path

import numpy as np
import torch

from vllm_w4a4_plugin.checkpoint import CheckpointError

from .divergence import Predictions, compare
from .served import served
from .tasks import TaskOptions, TaskResults, run_tasks

Listener = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one model.

    Attributes:
        directory: of the model.
        perplexity: None without text.
        tokens: that were predicted.
        seconds: for the text, without the start of the engine.
        tasks: name of a task -> name of a metric -> its value and standard error.
    """

    directory: Path
    perplexity: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    tasks: TaskResults = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured.

    Attributes:
        model, reference: of the two models; without a reference there are no windows either.
        windows: predictions of each window of text.
    """

    model: Measured
    reference: Measured | None = None
    windows: Sequence[Predictions] = ()


def evaluate(
    directory: Path,
    against: Path | None,
    rows: Sequence[Sequence[int]],
    tasks: TaskOptions | None = None,
    dtype: str = "auto",
    listener: Listener = lambda what, done, total: None,
) -> Evaluation:
    """Evaluate a model, and compare it with a reference.

    The reference's predictions wait in a temporary file while its engine gives way to the other one.

    Args:
        directory: of the model.
        against: of the reference, None for none.
        rows: token ids of windows of text; the first token of each is not predicted. May be empty.
        tasks: of lm-evaluation-harness, None for none.
        dtype: of activations.
        listener: is told about the progress.

    Raises:
        CheckpointError: the models have different vocabularies, or the disk is too small.
    """
    length = max([len(row) + 1 for row in rows] + ([tasks.max_length] if tasks else []))
    with tempfile.TemporaryDirectory(prefix="w4a4-eval-") as folder:
        store, reference, windows = _Store(Path(folder), rows), None, []
        if against is not None:
            reference = _measure(against, rows, tasks, dtype, length, listener, store.keep)

        def look(number: int, logprobs: torch.Tensor, targets: torch.Tensor) -> None:
            if against is not None:
                windows.append(compare(logprobs, store.kept(number, logprobs, directory), targets))

        model = _measure(directory, rows, tasks, dtype, length, listener, look)
    return Evaluation(model, reference, windows)


def _measure(
    directory: Path,
    rows: Sequence[Sequence[int]],
    tasks: TaskOptions | None,
    dtype: str,
    length: int,
    listener: Listener,
    look: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> Measured:
    """Measure one model; `look` gets number, log probabilities and targets of every window."""
    with served(directory, dtype, length) as model:
        started, loss, count = time.monotonic(), 0.0, 0
        for number, row in enumerate(rows):
            listener(f"Text, {directory.name}", number, len(rows))
            logprobs, targets = model.log_probabilities(row), torch.tensor(row[1:])
            loss -= float(logprobs.gather(1, targets[:, None]).double().sum())
            count += len(targets)
            look(number, logprobs, targets)
        seconds = time.monotonic() - started
        results = run_tasks(model, tasks, listener) if tasks else {}
    return Measured(directory, exp(loss / count) if rows else None, count, seconds, results)


def perplexity(directory: Path, rows: Sequence[Sequence[int]], dtype: str = "auto") -> Measured:
    """Perplexity through vLLM over rows of token ids; the first token of each row is not predicted."""
    return evaluate(directory, None, rows, dtype=dtype).model


class _Store:
    """The reference's log probabilities, float32 [tokens, vocabulary], in a file."""

    def __init__(self, folder: Path, rows: Sequence[Sequence[int]]) -> None:
        self.file = folder / "reference.bin"
        self.firsts = np.cumsum([0, *(len(row) - 1 for row in rows)])
        self.vocabulary = 0

    def keep(self, number: int, logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add those of window `number`; windows come in order."""
        self.vocabulary = logprobs.shape[1]
        try:
            with self.file.open("ab") as output:
                logprobs.numpy().tofile(output)
        except OSError as error:
            needed = 4e-9 * int(self.firsts[-1]) * self.vocabulary
            raise CheckpointError(
                f"{self.file.parent}: cannot keep the float model's predictions, {needed:.1f} GB: {error}. Set TMPDIR "
                "to a larger disk, or use fewer --windows."
            ) from None

    def kept(self, number: int, logprobs: torch.Tensor, directory: Path) -> torch.Tensor:
        """Those of window `number`."""
        if logprobs.shape[1] != self.vocabulary:
            raise CheckpointError(
                f"{directory}: expected a vocabulary of {self.vocabulary} tokens as in the float model, found "
                f"{logprobs.shape[1]}. Give the float model that the checkpoint was made from."
            )
        first, stop = (int(value) for value in self.firsts[number : number + 2])
        size = (stop - first) * self.vocabulary
        data = np.fromfile(self.file, np.float32, size, offset=4 * first * self.vocabulary)
        return torch.from_numpy(data.reshape(-1, self.vocabulary))
