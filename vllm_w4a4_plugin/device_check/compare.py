# SPDX-License-Identifier: Apache-2.0
"""Results of a device compared with the reference, and in words what a difference looks like."""

from dataclasses import replace

import torch
from torch import Tensor

from vllm_w4a4_plugin.constants import INT4_MAX, INT4_MIN
from vllm_w4a4_plugin.ops.npu.select import INT4_PER_WORD, Kernel
from vllm_w4a4_plugin.ops.npu.trial import (
    DIVISION_ERROR,
    Interval,
    Operands,
    expected_output,
    expected_quantization,
    output_bounds,
    output_tolerance,
    quantize,
    unpack_words,
)

from .outcome import Outcome, failed, passed


def compare_quantization(kernel: Kernel, operands: Operands, words: Tensor, scale: Tensor) -> Outcome:
    """q and scale of a kernel, int32 [tokens, in / 8] and float32 [tokens], against the reference.

    The scale first: it is one number per token, and a wrong one explains wrong q. At ties q may be one step away.
    """
    tokens, features = operands.x.shape
    for name, found, shape, dtype in (
        ("q", words, (tokens, features // INT4_PER_WORD), torch.int32),
        ("scale", scale, (tokens,), torch.float32),
    ):
        if found.shape != shape or found.dtype != dtype:
            return failed(f"{name}: expected {dtype} {list(shape)}, found {found.dtype} {list(found.shape)}")
    expected = expected_quantization(kernel, operands)
    scale, q = scale.cpu(), unpack_words(words)
    wrong = ~((scale - expected.scale).abs() <= expected.scale * DIVISION_ERROR)
    if wrong.any():
        token = int(wrong.nonzero()[0])
        return failed(
            f"scale: {int(wrong.sum())} of {tokens} tokens differ, token {token} has {scale[token]:.9g}, expected "
            f"{expected.scale[token]:.9g}{_hint(_scale_hint(kernel, operands, scale, expected.scale))}"
        )
    moved = (q < expected.low) | (q > expected.high)
    if moved.any():
        token, feature = (int(i) for i in moved.nonzero()[0])
        return failed(
            f"q: {int(moved.sum())} of {q.numel()} values differ, token {token} feature {feature} is "
            f"{int(q[token, feature])}, expected {int(expected.q[token, feature])}"
            f"{_hint(_q_hint(kernel, operands, q, expected))}"
        )
    ties, inexact = int((q != expected.q).sum()), int((scale != expected.scale).sum())
    counts = [f"{ties} of {q.numel()} values one step away at ties"] if ties else []
    counts += [f"{inexact} of {tokens} scales off in the last place"] if inexact else []
    return passed(", ".join(counts), values=q.numel(), ties=ties, inexact_scales=inexact)


def compare_product(operands: Operands, q: Tensor, scale: Tensor, y: Tensor) -> Outcome:
    """y [tokens, out] of a kernel for given q and scale, all on the CPU."""
    expected = expected_output(q, scale, operands)
    return _compare_output(operands, y, expected, output_tolerance(expected, operands), {})


def compare_linear(kernel: Kernel, operands: Operands, y: Tensor) -> Outcome:
    """y [tokens, out] of a kernel that does everything in one launch; q at ties may be either of two values."""
    expected, tolerance, ties = output_bounds(kernel, operands)
    return _compare_output(operands, y, expected, tolerance, {"possible_ties": ties})


def worst(outcomes: list[Outcome]) -> Outcome:
    """The first failure of several comparisons, or their counts added up."""
    for outcome in outcomes:
        if outcome.status != "ok":
            return outcome
    totals: dict[str, int] = {}
    for outcome in outcomes:
        for name, value in outcome.data.items():
            totals[name] = totals.get(name, 0) + value
    texts = {"ties": "values one step away at ties", "inexact_scales": "scales off in the last place"}
    counted = [f"{totals[name]} {text}" for name, text in texts.items() if totals.get(name)]
    if not counted:
        return passed("exact" if totals.get("rounded", 0) == 0 else "", **totals)
    return passed(", ".join(counted), **totals)


def _compare_output(
    operands: Operands, y: Tensor, expected: Tensor, tolerance: Tensor, data: dict[str, int]
) -> Outcome:
    if y.shape != expected.shape or y.dtype != operands.x.dtype:
        return failed(f"output: expected {operands.x.dtype} {list(expected.shape)}, found {y.dtype} {list(y.shape)}")
    found = y.float()
    wrong = ~((found - expected).abs() <= tolerance)
    if wrong.any():
        token, output = (int(i) for i in wrong.nonzero()[0])
        hint = ""
        if operands.bias is not None:
            without = expected - operands.bias
            if torch.allclose(found, without, rtol=1e-2, atol=1e-3):
                hint = "the bias was not added"
        return failed(
            f"output: {int(wrong.sum())} of {y.numel()} values differ, token {token} output {output} is "
            f"{found[token, output]:.6g}, expected {expected[token, output]:.6g}{_hint(hint)}"
        )
    rounded = int((y != expected.to(y.dtype)).sum())
    return passed(values=y.numel(), rounded=rounded, **data)


def _hint(text: str) -> str:
    return f" ({text})" if text else ""


def _near(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4)


def _scale_hint(kernel: Kernel, operands: Operands, found: Tensor, expected: Tensor) -> str:
    clip = operands.clip_ratio
    if clip != 1 and _near(found, expected / clip**2):
        return "the inverse of clip_ratio is used, as in torch_npu's skipped test"
    if clip != 1 and _near(found, expected / clip):
        return "clip_ratio is not used"
    if _near(found, expected * INT4_MAX / -INT4_MIN):
        return f"the maximum is divided by {-INT4_MIN} instead of {INT4_MAX}"
    for name, changed in _transposed(operands).items():
        if _near(found, quantize(kernel, changed)[1]):
            return name
    return ""


def _q_hint(kernel: Kernel, operands: Operands, q: Tensor, expected: Interval) -> str:
    for name, width in (("the two int4 values of each byte are swapped", 2), ("each 32-bit word is reversed", 8)):
        if torch.equal(q, expected.q.unflatten(-1, (-1, width)).flip(-1).flatten(-2)):
            return name
    if torch.equal(q, expected.q.clamp(min=-INT4_MAX)):
        return "values stop at -7 where -8 is expected"
    for name, changed in _transposed(operands).items():
        if (q != quantize(kernel, changed)[0]).float().mean() < 1e-2:
            return name
    if int((q - expected.q).abs().max()) == 1:
        return "all by one step, but not at ties"
    return ""


def _transposed(operands: Operands) -> dict[str, Operands]:
    left, right = operands.left_trans, operands.right_trans
    changed = {}
    if left is not None:
        changed["left_trans acts as its transpose"] = replace(operands, left_trans=left.t().contiguous())
    if right is not None:
        changed["right_trans acts as its transpose"] = replace(operands, right_trans=right.t().contiguous())
    return changed
