# SPDX-License-Identifier: Apache-2.0
"""Steps that compare operators with the reference: packing, layouts, q and scale, products, whole layers."""

from dataclasses import replace

import torch
from torch import Tensor

from vllm_w4a4_plugin.constants import INT4_MAX, INT4_MIN
from vllm_w4a4_plugin.ops.npu import cann
from vllm_w4a4_plugin.ops.npu.select import INT4_PER_WORD, Kernel
from vllm_w4a4_plugin.ops.npu.trial import DeviceLinear, Operands, unpack_words

from .compare import compare_linear, compare_product, compare_quantization, worst
from .layers import Session, on_device, operands_of
from .layouts import LOST, cyclic, describe
from .outcome import Outcome, failed, passed
from .plan import Step

LAYOUT_FACTORS = (8, 16)
"""Sizes of the factors of one-hot tests; their product is a multiple of what every kernel needs."""
SHIFTS = ((0, 0), (1, 0), (0, 1))
"""By how much the factors shift rows and columns: not at all, so that only packing counts, then one at a time."""


def pack(step: Step, session: Session) -> Outcome:
    """Where `npu_convert_weight_to_int4pack` puts each of eight values of a word, and whether -8 to 7 survive."""
    one_hot = torch.eye(INT4_PER_WORD, dtype=torch.int8)
    (words,) = session.on_cpu(cann.pack_int4(one_hot, session.device))
    found = [_only_position(row) for row in unpack_words(words)]
    expected = list(range(INT4_PER_WORD))
    if text := describe(found, expected, 1, INT4_PER_WORD, (0, 0)):
        return failed(text, permutation=found)
    values = torch.arange(INT4_MIN, INT4_MAX + 1, dtype=torch.int8)[None]
    (words,) = session.on_cpu(cann.pack_int4(values, session.device))
    if not torch.equal(unpack_words(words), values):
        return failed(f"values {values.tolist()[0]} come back as {unpack_words(words).tolist()[0]}")
    return passed("first value in the low nibble")


def layout(step: Step, session: Session) -> Outcome:
    """Where each of the input features comes out, by one-hot tokens and weights that spell the position in bits."""
    kernel, (left, right) = Kernel(step.kernel), LAYOUT_FACTORS
    for shifts in SHIFTS if kernel is not Kernel.UNTRANSFORMED else SHIFTS[:1]:
        operands = _spelling(left, right, shifts, kernel)
        (y,) = session.on_cpu(DeviceLinear(kernel, operands, session.device)(operands.x.to(session.device)))
        found = [_spelled(row) for row in y.float() > 0.5]
        if text := describe(found, cyclic(left, right, *shifts), left, right, shifts):
            return failed(text, permutation=found, shifts=shifts)
    return passed("every input feature comes out where it should")


def quantize(step: Step, session: Session) -> Outcome:
    """q and scale alone."""
    found = []
    for tokens in step.arguments["tokens"]:
        operands = operands_of(step, tokens, is_whole=True)
        q, scale = session.on_cpu(*on_device(step, operands, session).quantize(operands.x.to(session.device)))
        found.append(compare_quantization(Kernel(step.kernel), operands, q, scale))
    return worst(found)


def multiply(step: Step, session: Session) -> Outcome:
    """The product alone, on int4 values that include -8."""
    most = max(step.arguments["tokens"])
    operands = operands_of(step, most)
    layer = on_device(step, operands, session)
    generator = torch.Generator().manual_seed(most)
    all_q = torch.randint(INT4_MIN, INT4_MAX + 1, operands.x.shape, generator=generator).to(torch.int8)
    all_scales = torch.rand(most, generator=generator) + 0.1
    found = []
    for tokens in step.arguments["tokens"]:
        q, scale = all_q[:tokens], all_scales[:tokens]
        (y,) = session.on_cpu(layer.multiply(cann.pack_int4(q, session.device), scale.to(session.device)))
        found.append(compare_product(operands, q, scale, y))
    return worst(found)


def linear(step: Step, session: Session) -> Outcome:
    """A whole layer in one launch."""
    operands = operands_of(step, max(step.arguments["tokens"]))
    layer = on_device(step, operands, session)
    found = []
    for tokens in step.arguments["tokens"]:
        few = replace(operands, x=operands.x[:tokens])
        (y,) = session.on_cpu(layer(few.x.to(session.device)))
        outcome = compare_linear(Kernel(step.kernel), few, y)
        if outcome.status != "ok":
            return replace(outcome, message=f"{tokens} tokens: {outcome.message}")
        found.append(outcome)
    return worst(found)


def phases(step: Step, session: Session) -> Outcome:
    """The fused kernel's phases in launches of their own: q and scale, then perhaps the product of these."""
    (tokens,) = step.arguments["tokens"]
    operands = operands_of(step, tokens)
    layer = on_device(step, operands, session)
    device_y, *quantized = layer.in_two_launches(operands.x.to(session.device), step.arguments["phases"])
    y, q, scale = session.on_cpu(device_y, *quantized)
    outcome = compare_quantization(Kernel(step.kernel), operands, q, scale)
    if outcome.status != "ok" or step.arguments["phases"] == 1:
        return outcome
    return compare_product(operands, unpack_words(q), scale, y)


def nonfinite(step: Step, session: Session) -> Outcome:
    """A NaN or an infinity in one token must show in all its outputs and in no other token's."""
    is_whole = step.kernel != Kernel.FUSED
    operands = operands_of(step, 5, is_whole=is_whole)
    layer = on_device(step, operands, session)
    (clean,) = session.on_cpu(layer(operands.x.to(session.device)))
    for name, value in (("NaN", float("nan")), ("infinity", float("inf"))):
        x = operands.x.clone()
        x[2, 3] = value
        (y,) = session.on_cpu(layer(x.to(session.device)))
        if not torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]]):
            return failed(f"a token with {name} changes other tokens")
        if y[2].isfinite().any():
            count = int(y[2].isfinite().sum())
            return failed(
                f"{name} is lost: {count} of {y.shape[1]} outputs of a token with {name} are finite, e.g. "
                f"{float(y[2][y[2].isfinite()][0]):.4g}"
            )
    return passed("visible in the outputs of their token only")


def _only_position(row: Tensor) -> int:
    positions = row.nonzero().flatten().tolist()
    return positions[0] if len(positions) == 1 else LOST


def _spelling(left: int, right: int, shifts: tuple[int, int], kernel: Kernel) -> Operands:
    """A layer whose output for the one-hot token j is the position, in bits, at which its weights meet the token."""
    size = left * right
    positions = torch.arange(size)
    bits = torch.stack([(positions >> bit) & 1 for bit in range(size.bit_length() - 1)]).to(torch.int8)
    weight = torch.zeros(16, size, dtype=torch.int8)
    weight[: bits.shape[0]] = bits
    weight[-1] = 1  # whether the token met any weight
    has_transform = kernel is not Kernel.UNTRANSFORMED
    return Operands(
        x=torch.eye(size, dtype=torch.bfloat16),
        weight=weight,
        weight_scale=torch.ones(16),
        left_trans=torch.eye(left).roll(shifts[0], 1) if has_transform else None,
        right_trans=torch.eye(right).roll(shifts[1], 1) if has_transform else None,
        clip_ratio=1.0,
        bias=None,
    )


def _spelled(row: Tensor) -> int:
    bits = row.tolist()
    return sum(bit << place for place, bit in enumerate(bits[:-1])) if bits[-1] else LOST
