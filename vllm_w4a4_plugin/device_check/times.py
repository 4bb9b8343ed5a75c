# SPDX-License-Identifier: Apache-2.0
"""How long a layer takes, next to the lower bound of the device."""

from vllm_w4a4_plugin.capacity.devices import DEVICES, Device
from vllm_w4a4_plugin.capacity.roofline import linear_time
from vllm_w4a4_plugin.checkpoint import QuantType

from .layers import Session, operands_of, runnable
from .outcome import Outcome, passed
from .plan import Step

WARM_UP, REPEATS = 3, 20


def time(step: Step, session: Session) -> Outcome:
    """Microseconds per call, back to back, by events on the device; no check."""
    device = _device(session)
    is_divided = step.arguments["whole_input"] != step.arguments["sizes"][1]
    operands = operands_of(step, max(step.arguments["tokens"]), is_whole=is_divided)
    compute, all_x = runnable(step, operands, session), operands.x.to(session.device)
    rows = []
    for tokens in step.arguments["tokens"]:
        x = all_x[:tokens]
        for _ in range(WARM_UP):
            compute(x)
        start, end = (session.npu.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPEATS):
            compute(x)
        end.record()
        session.npu.synchronize()
        microseconds = start.elapsed_time(end) * 1e3 / REPEATS
        output_size, input_size = step.arguments["sizes"]
        kind = QuantType(step.arguments["quant_type"])
        bound = 1e6 * linear_time(kind, output_size, input_size, tokens, device)
        rows.append({"tokens": tokens, "microseconds": microseconds, "bound": bound, "bound_device": device.name})
    text = ", ".join(f"{row['tokens']} tokens {row['microseconds']:.1f} us (bound {row['bound']:.1f})" for row in rows)
    return passed(text, times=rows, kernel=step.kernel)


def _device(session: Session) -> Device:
    """The figures of this device, or those of a 910B2 if they are not known."""
    name = session.npu.get_device_name(session.device.index or 0)
    return next((device for device in DEVICES.values() if device.name in name), DEVICES["910B2"])
