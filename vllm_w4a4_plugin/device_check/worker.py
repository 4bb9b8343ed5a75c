# SPDX-License-Identifier: Apache-2.0
"""The process that computes: steps come as JSON on standard input, results go as JSON lines to a pipe of their own.

Standard output and error stay free for whatever CANN prints. A step that raised may have left the device in a state
in which everything after it fails, so the process ends after it, and a new one goes on.

    python -m vllm_w4a4_plugin.device_check.worker DEVICE RESULTS_FD
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from .outcome import failed
from .plan import Step

RESTART = 3
"""Exit code of a worker whose last step raised."""


def main(argv: list[str] | None = None) -> int:
    """Run the steps; returns the exit code."""
    device, results = argv or sys.argv[1:]
    steps = [Step(**values) for values in json.load(sys.stdin)]
    with os.fdopen(int(results), "w") as pipe:

        def send(message: dict[str, Any]) -> None:
            print(json.dumps(message), file=pipe, flush=True)

        try:
            session = open_session(device)
        except Exception as error:
            from .steps import explain

            send({"start": failed(explain(error)).as_json()})
            return 1
        send({"start": None})
        return run_steps(steps, session, send)


def open_session(name: str) -> Any:
    """Import torch_npu and choose the device."""
    import torch
    import torch_npu

    from vllm_w4a4_plugin.ops.npu import cann, fused

    from .layers import Session

    device = torch.device(name)
    if device.type == "cpu":
        # The stand-in for torch_npu of the tests computes on CPU tensors.
        cann.register_kernels("CPU")
        fused.register_kernel("CPU")
    else:
        torch_npu.npu.set_device(device)
    return Session(device, torch_npu.npu)


def run_steps(steps: list[Step], session: Any, send: Callable[[dict[str, Any]], None]) -> int:
    """Execute steps in order until one raises."""
    from .steps import execute

    for step in steps:
        send({"begin": step.title})
        outcome = execute(step, session)
        send({"end": outcome.as_json()})
        if "exception" in outcome.data:
            return RESTART
    return 0


if __name__ == "__main__":
    sys.exit(main())
