# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness on a model that is being served."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_w4a4_plugin.checkpoint import CheckpointError

if TYPE_CHECKING:
    from .served import Served

TaskResults = dict[str, dict[str, tuple[float, float | None]]]
"""Name of a task -> name of a metric -> its value and its standard error, None where the harness knows none."""

_BOOTSTRAPS = 1000


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks to run.

    Attributes:
        names: of tasks, groups or tags, as the harness spells them.
        folder: with YAML files of further tasks.
        limit: most examples of each task, None for all.
        max_length: tokens of the longest prompt with its answer.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    max_length: int = 2048


def require_harness() -> None:
    """Raise CheckpointError unless lm-evaluation-harness is installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"--tasks needs lm-evaluation-harness, which cannot be imported ({error}). Install it with "
            "`pip install 'vllm-w4a4-plugin[eval]'`."
        ) from None


def check_tasks(options: TaskOptions) -> None:
    """Raise CheckpointError if the harness is not installed or does not know a task. Starts no engine."""
    require_harness()
    from lm_eval.tasks import TaskManager

    known = set(TaskManager(include_path=_folder(options)).all_tasks)
    if unknown := [name for name in options.names if name not in known]:
        raise CheckpointError(
            f"--tasks: lm-evaluation-harness has no task {', '.join(unknown)}. `lm_eval ls tasks` lists its own; "
            "--task-dir names a folder with YAML files of others."
        )


def run_tasks(model: "Served", options: TaskOptions, listener: Callable[[str, int, int], None]) -> TaskResults:
    """The results of every task on a model.

    Args:
        model: in its engine.
        options: which tasks; they passed `check_tasks`.
        listener: is told about the progress of each kind of request.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from .harness import HarnessModel

    found = simple_evaluate(
        model=HarnessModel(model, listener),
        tasks=list(options.names),
        task_manager=TaskManager(include_path=_folder(options)),
        limit=options.limit,
        bootstrap_iters=_BOOTSTRAPS,
        log_samples=False,
    )
    return {task: metrics(values) for task, values in found["results"].items()}


def metrics(values: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Value and standard error of each metric, from what the harness reports of one task.

    The harness writes `acc,none` for the value and `acc_stderr,none` for its error; the part after the comma names a
    filter of answers.
    """
    result: dict[str, tuple[float, float | None]] = {}
    for key, value in values.items():
        name, comma, kept = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{kept}")
        result[name if kept == "none" else f"{name} ({kept})"] = (
            float(value),
            float(error) if isinstance(error, int | float) else None,
        )
    return result


def _folder(options: TaskOptions) -> str | None:
    return str(options.folder) if options.folder is not None else None


def difference_error(errors: Sequence[float | None]) -> float | None:
    """Standard error of a difference of independent values, None if one is not known."""
    known = [error for error in errors if error is not None]
    return sum(error**2 for error in known) ** 0.5 if len(known) == len(errors) else None
