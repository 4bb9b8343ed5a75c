# SPDX-License-Identifier: Apache-2.0
"""A captured graph replayed with new inputs, against the same layer without a graph."""

import torch

from .layers import Session, operands_of, runnable
from .outcome import Outcome, failed, passed
from .plan import Step

TOKENS, REPLAYS = 16, 3


def graph(step: Step, session: Session) -> Outcome:
    """Capture once, replay with inputs that the graph has not seen; results must be those without a graph."""
    operands = operands_of(step, TOKENS, is_whole=step.arguments["whole_input"] != step.arguments["sizes"][1])
    compute = runnable(step, operands, session)
    first = operands.x.to(session.device)
    static = first.clone()
    compute(static)  # outside the capture, because a first call may allocate and compile
    session.npu.synchronize()
    captured = session.npu.NPUGraph()
    with session.npu.graph(captured):
        output = compute(static)
    stale = None
    for number in range(REPLAYS):
        x = operands.x.roll(number + 1, 0).flip(-1) if number else operands.x
        static.copy_(x.to(session.device))
        captured.replay()
        (replayed,) = session.on_cpu(output.clone())
        (eager,) = session.on_cpu(compute(x.to(session.device)))
        if not torch.equal(replayed, eager):
            count = int((replayed != eager).sum())
            what = "the graph ignores its new inputs" if stale is not None and torch.equal(replayed, stale) else "wrong"
            return failed(f"replay {number + 1}: {count} of {eager.numel()} values differ from eager ({what})")
        stale = replayed
    return passed(f"{REPLAYS} replays equal eager")
