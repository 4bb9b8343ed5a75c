# SPDX-License-Identifier: Apache-2.0
"""The table of actions: step kind -> function of step and session. Whatever an action raises becomes its outcome."""

import ctypes
import re
from collections.abc import Callable

from vllm_w4a4_plugin.ops.npu import fused
from vllm_w4a4_plugin.ops.npu.select import Kernel

from . import experts, graphs, operators, times
from .environment import device_outcome
from .layers import Session
from .outcome import Outcome, Status, failed, passed
from .plan import Step


def device(step: Step, session: Session) -> Outcome:
    """Name, cores and memory, and one computation."""
    import torch

    index = session.device.index or 0
    properties = session.npu.get_device_properties(index)
    free, total = session.npu.mem_get_info(index)
    ones = torch.ones(16, device=session.device)
    if session.on_cpu(ones + ones)[0].tolist() != [2.0] * 16:
        return failed("1 + 1 is not 2 on this device")
    cubes, vectors = (getattr(properties, f"{kind}_core_num", None) for kind in ("cube", "vector"))
    return device_outcome(session.npu.get_device_name(index), cubes, vectors, free, total)


def library(step: Step, session: Session) -> Outcome:
    """Whether the fused library is there, has all its symbols and registers its operator."""
    import torch

    file = fused.library_file()
    if file is not None:
        try:
            ctypes.CDLL(str(file))  # resolves every symbol at once
        except OSError as error:
            symbol = re.search(r"undefined symbol: (\S+)", str(error))
            if symbol:
                return failed(f"{file}: undefined symbol {symbol[1]}. Build it again with the CANN that is installed")
            return failed(f"{file} cannot be loaded: {error}")
    if reason := fused.unavailable_reason():
        return failed(reason)
    if not hasattr(torch.ops.vllm_w4a4_npu, "flatquant_linear"):
        return failed(f"{file} does not define vllm_w4a4_npu::flatquant_linear")
    return passed(str(file or ""))


def refused(step: Step, session: Session) -> Outcome:
    """A layer that no kernel can compute: the model would not load."""
    return failed(step.arguments["reason"])


ACTIONS: dict[str, Callable[[Step, Session], Outcome]] = {
    "device": device,
    "library": library,
    "refused": refused,
    "pack": operators.pack,
    "layout": operators.layout,
    "quantize": operators.quantize,
    "multiply": operators.multiply,
    "phases": operators.phases,
    "linear": operators.linear,
    "nonfinite": operators.nonfinite,
    "expert products": experts.products,
    "expert transform": experts.transform,
    "expert activation": experts.activation,
    "graph": graphs.graph,
    "time": times.time,
}


def execute(step: Step, session: Session) -> Outcome:
    """Do a step; an exception is a failure with a hint. Without the fused library, steps that need it are skipped."""
    try:
        if step.kernel == Kernel.FUSED and fused.unavailable_reason():
            return Outcome(Status.SKIPPED, "the fused library is not loaded")
        return ACTIONS[step.kind](step, session)
    except Exception as error:
        return Outcome(Status.FAILED, explain(error), {"exception": type(error).__name__, "text": str(error)[:4000]})


def explain(error: Exception) -> str:
    """An exception of torch_npu in one line, with advice where the cause is known."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()[:300]
    if "out of memory" in str(error).lower():
        return f"out of memory: stop other processes on this device (npu-smi info). {text}"
    if isinstance(error, AttributeError) and "npu_" in text:
        return f"this torch_npu lacks an operator: {text}. Install a newer torch_npu and CANN"
    if "bias" in text.lower():
        return f"the operator refuses the bias: {text}"
    return f"{type(error).__name__}: {text}"
