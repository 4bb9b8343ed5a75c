# SPDX-License-Identifier: Apache-2.0
"""Runs a plan in worker processes: a time limit for each step, and a new worker after one that was lost."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from .outcome import Outcome, Status, failed
from .plan import START_LIMIT, Phase, Step
from .worker import RESTART

MAX_LOST = 3
"""Steps of one phase that may hang or crash before its other steps are skipped."""

TAIL = 2000
"""Characters of a worker's output that are kept of a crash."""

NO_DEVICE = "no worker could use the device"

WORKER = (sys.executable, "-m", "vllm_w4a4_plugin.device_check.worker")


@dataclass(frozen=True)
class Result:
    """A step, what came of it, and how many seconds it took."""

    step: Step
    outcome: Outcome
    seconds: float = 0.0


def run_plan(
    steps: Sequence[Step],
    device: str,
    on_begin: Callable[[Step], None],
    on_result: Callable[[Result], None],
    worker: Sequence[str] = WORKER,
    start_limit: float = START_LIMIT,
) -> list[Result]:
    """All steps in order, each with its result.

    Args:
        steps: of the plan.
        device: as torch names it, e.g. "npu:0".
        on_begin, on_result: are told of each step.
        worker: command of a worker, without its arguments.
        start_limit: seconds for a worker to start.
    """
    results: list[Result] = []
    waiting = list(steps)
    lost: dict[Phase, int] = {}
    while waiting:
        if lost.get(phase := Phase(waiting[0].phase), 0) >= MAX_LOST:
            skipped = Outcome(Status.SKIPPED, f"{MAX_LOST} steps before it hung or crashed")
            done, is_lost = [Result(waiting[0], skipped)], False
            on_result(done[0])
        else:
            done, is_lost = [], False
            for result, was_lost in _of_one_worker(waiting, device, on_begin, worker, start_limit):
                done.append(result)
                is_lost = is_lost or was_lost
                on_result(result)
                phase = Phase(result.step.phase)
                if was_lost:
                    lost[phase] = lost.get(phase, 0) + 1
        results += done
        waiting = waiting[len(done) :]
    return results


def _of_one_worker(
    steps: Sequence[Step], device: str, on_begin: Callable[[Step], None], worker: Sequence[str], start_limit: float
) -> Iterator[tuple[Result, bool]]:
    """Results until the worker ends, each with whether the worker was lost; at least one."""
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as output, os.fdopen(reading) as results:
        process = subprocess.Popen(
            [*worker, device, str(writing)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(json.dumps([step.as_json() for step in steps]).encode())
            lines = _Lines(results)
            message = lines.next(start_limit)
            if not isinstance(message, dict) or message["start"] is not None:
                if isinstance(message, dict):
                    why = Outcome.from_json(message["start"])
                else:
                    why = _lost(message, process, output, start_limit)
                yield Result(steps[0], why), False
                for step in steps[1:]:
                    yield Result(step, Outcome(Status.SKIPPED, NO_DEVICE)), False
                return
            for step in steps:
                started = time.monotonic()
                message = lines.next(step.limit)
                if message is None and step is not steps[0] and _exit_code(process) == RESTART:
                    return  # the step before raised
                if isinstance(message, dict):
                    on_begin(step)
                    message = lines.next(step.limit)
                seconds = time.monotonic() - started
                if not isinstance(message, dict):
                    yield Result(step, _lost(message, process, output, step.limit), seconds), True
                    return
                yield Result(step, Outcome.from_json(message["end"]), seconds), False
        finally:
            _end(process)


class _Lines:
    """JSON lines from a pipe, with a time limit for each."""

    def __init__(self, pipe: IO[str]) -> None:
        self.descriptor, self.buffer = pipe.fileno(), b""

    def next(self, limit: float) -> dict[str, Any] | str | None:
        """The next message; "late" if none came in time, None at the end of the pipe."""
        deadline = time.monotonic() + limit
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.descriptor], [], [], left)[0]:
                return "late"
            data = os.read(self.descriptor, 1 << 16)
            if not data:
                return None
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)


def _lost(message: str | None, process: subprocess.Popen, output: IO[bytes], limit: float) -> Outcome:
    if message == "late":
        return failed(f"hangs: nothing came back within {limit:.0f} s", kind="hang")
    code = _exit_code(process)
    output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL))
    tail = output.read().decode(errors="replace")
    name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    last = next((line for line in reversed(tail.splitlines()) if line.strip()), "")
    return failed(f"the process ended ({name}) {last[:200]}".rstrip(), kind="crash", output=tail)


def _exit_code(process: subprocess.Popen) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return process.wait(10)
    return None


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process that waits for a driver cannot always be killed
            process.wait(10)
