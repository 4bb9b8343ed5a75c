# SPDX-License-Identifier: Apache-2.0
"""The lines, the exit code and the JSON file of a check. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_w4a4_plugin.constants import VERSION
from vllm_w4a4_plugin.ops.npu.select import Kernel

from .outcome import Outcome, Status
from .plan import Phase, Step
from .run import NO_DEVICE, Result

FORMAT = 1
"""Of the JSON file; raised when the meaning of a key changes."""

PASSED, FAILED, FUSED_FAILED, NO_NPU = 0, 1, 3, 4
"""Exit codes: 2 is that of wrong arguments."""

VERDICTS = {
    PASSED: "Passed. The plugin's NPU kernels compute on this machine what the reference computes.",
    FAILED: "Failed. Do not serve with the plugin on this machine; vllm-ascend alone: VLLM_W4A4_DISABLE=1.",
    FUSED_FAILED: "CANN's operators passed, the fused library failed. Serve with VLLM_W4A4_NPU_FUSED=0.",
    NO_NPU: "Not checked: no NPU could be used.",
}


def title_of(step: Step) -> str:
    """A step's title, after the kernel that it is about."""
    return f"[{Kernel(step.kernel).name.lower()}] {step.title}" if step.kernel else step.title


def line(title: str, outcome: Outcome) -> str:
    """What came of something, in one line."""
    return f"{outcome.status.value:8}{title}{': ' if outcome.message else ''}{outcome.message}"


def exit_code(environment: Iterable[Outcome], results: Sequence[Result]) -> int:
    """What the check as a whole found."""
    if any(result.outcome.message == NO_DEVICE for result in results) and not any(
        result.outcome.status is Status.OK for result in results
    ):
        return NO_NPU
    bad = [result for result in results if result.outcome.status is Status.FAILED]
    if any(not _is_fused(result) for result in bad) or any(o.status is Status.FAILED for o in environment):
        return FAILED
    return FUSED_FAILED if bad else PASSED


def as_json(
    model: str, ranks: int, environment: Mapping[str, Outcome], results: Sequence[Result], code: int
) -> dict[str, Any]:
    """Everything that was found, to attach to an issue."""
    return {
        "format": FORMAT,
        "plugin": VERSION,
        "model": model,
        "tensor_parallel_size": ranks,
        "exit_code": code,
        "verdict": VERDICTS[code],
        "environment": {title: outcome.as_json() for title, outcome in environment.items()},
        "steps": [
            {**result.step.as_json(), "seconds": round(result.seconds, 3), **result.outcome.as_json()}
            for result in results
        ],
    }


def _is_fused(result: Result) -> bool:
    return result.step.phase == Phase.FUSED or result.step.kernel == Kernel.FUSED
