# SPDX-License-Identifier: Apache-2.0
"""Rounding of weights and activations to codes of a few bits.

Codes are symmetric: weights use -top ... top, activations -top - 1 ... top, with top = 2^(bits-1) - 1.
"""

import torch
from torch import Tensor

ACTIVATION_CLIPS = tuple(c / 20 for c in range(12, 21))
WEIGHT_CLIPS = tuple(c / 20 for c in range(10, 21))
REFIT_RIDGE = 0.02  # of the Hessian's mean diagonal
GPTQ_DAMPING = 0.01  # of the Hessian's mean diagonal
GPTQ_BLOCK = 128
DOUBLE_UP_TO = 8192  # input size; a larger matrix in float64 would need more memory than the rest of the run
SWEEPS = 3  # of coordinate descent


def largest_code(bits: int) -> int:
    """The largest integer of a symmetric code."""
    return 2 ** (bits - 1) - 1


def quantize_tokens(x: Tensor, clip: float, bits: int = 4) -> Tensor:
    """x [..., n] after dynamic per-token quantization, dequantized: scale = clip * max|x| / top.

    16 bits stand for the model's own float dtype: x is returned as it is.
    """
    if bits == 16:
        return x
    top = largest_code(bits)
    scale = x.abs().amax(-1, keepdim=True).mul_(clip / top).clamp_min_(torch.finfo(x.dtype).tiny)
    return (x / scale).round_().clamp_(smallest_activation(bits), top).mul_(scale)


def smallest_activation(bits: int) -> int:
    """The smallest quantized activation: -8 of 4 bits, -127 of 8, as the operators have it."""
    return -largest_code(bits) - (bits == 4)


def best_activation_clip(x: Tensor, weight_moment: Tensor, token_weight: Tensor, bits: int = 4) -> float:
    """The clip ratio with the smallest output error: the sum over tokens of weight * e Sw e', e = quantized - x.

    Args:
        x: [tokens, n], transformed.
        weight_moment: Sw [n, n].
        token_weight: [tokens].
        bits: of the activations.
    """

    def cost(clip: float) -> float:
        error = (quantize_tokens(x, clip, bits) - x) * token_weight.sqrt()[:, None]
        return torch.sum((error @ weight_moment) * error).item()

    return min(ACTIVATION_CLIPS, key=cost)


def best_weight_scale(weight: Tensor, importance: Tensor, bits: int = 4) -> Tensor:
    """Per-channel scale [output_size, 1] with the smallest error, inputs weighted by `importance` [input_size]."""
    top = largest_code(bits)
    full = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny * 1e8) / top
    best, scale = torch.full_like(full, float("inf")), full
    for clip in WEIGHT_CLIPS:
        trial = full * clip
        error = (weight - (weight / trial).round_().clamp_(-top, top) * trial).square_() @ importance[:, None]
        scale = torch.where(error < best, trial, scale)
        best = torch.minimum(error, best)
    return scale


def refit(weight: Tensor, quantized_moment: Tensor, cross_moment: Tensor, ridge: float = REFIT_RIDGE) -> Tensor:
    """Weights whose product with the quantized input is closest to that of `weight` with the exact input.

    Minimises |Xq V' - X W'|^2 + ridge * mean(diag) |V - W|^2.

    Args:
        weight: W [output_size, n].
        quantized_moment: Xq' Xq [n, n].
        cross_moment: Xq' X [n, n].
        ridge: strength of the second term.
    """
    shift = (ridge * quantized_moment.diagonal().mean()).clamp_min(1e-30)  # all inputs may be zero
    factor = quantized_moment.clone()
    factor.diagonal().add_(shift)
    factor = torch.linalg.cholesky(factor)
    return torch.cholesky_solve((cross_moment @ weight.t()).add_(weight.t() * shift), factor).t()


def gptq(weight: Tensor, scale: Tensor, hessian: Tensor, bits: int = 4, damping: float = GPTQ_DAMPING) -> Tensor:
    """Integer codes [output_size, n], in a float dtype, that reduce the error under the Hessian column by column.

    GPTQ (arXiv 2210.17323): round one column, then spread its error over the columns not yet rounded. Columns are
    taken in descending order of the Hessian's diagonal.

    Args:
        weight: [output_size, n].
        scale: [output_size, 1].
        hessian: [n, n].
        bits: of the codes.
        damping: added to the Hessian's diagonal, relative to its mean.
    """
    top = largest_code(bits)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    # Transposed, so that a column of W, which one step handles, is contiguous; and divided by the scales only once.
    w = (weight / scale).t()[order].contiguous()
    h = hessian[order[:, None], order].to(torch.float64 if len(w) <= DOUBLE_UP_TO else torch.float32)
    h.diagonal().add_((damping * h.diagonal().mean()).clamp_min(1e-30))
    h = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(h, upper=True).to(w.dtype)
    del h
    codes = torch.empty_like(w)
    for start in range(0, len(w), GPTQ_BLOCK):
        stop = min(start + GPTQ_BLOCK, len(w))
        errors = torch.empty_like(w[start:stop])
        triangle = upper[start:stop, start:stop] / upper.diagonal()[start:stop, None]
        for i in range(stop - start):
            row = w[start + i]
            torch.round(row, out=codes[start + i]).clamp_(-top, top)
            torch.sub(row, codes[start + i], out=errors[i])
            w[start + i + 1 : stop].addr_(triangle[i, i + 1 :], errors[i], alpha=-1)
        errors /= upper.diagonal()[start:stop, None]
        w[stop:] -= upper[start:stop, stop:].t() @ errors
    return codes[torch.argsort(order)].t().contiguous()


def coordinate_descent(
    codes: Tensor, weight: Tensor, scale: Tensor, hessian: Tensor, bits: int = 4, sweeps: int = SWEEPS
) -> Tensor:
    """Improve codes by coordinate descent: each in turn becomes the best integer while the others stay fixed.

    GPTQ never returns to a column; a few sweeps over all columns reduce the same error by another tenth.

    Args:
        codes: [output_size, n], to start from.
        weight: [output_size, n].
        scale: [output_size, 1].
        hessian: [n, n].
        bits: of the codes.
        sweeps: over all columns.
    """
    top = largest_code(bits)
    c, target = codes.t().contiguous(), (weight / scale).t().contiguous()
    curvature = hessian.diagonal().clamp_min(torch.finfo(hessian.dtype).tiny)
    for _ in range(sweeps):
        gradient = hessian @ (c - target)
        for start in range(0, len(c), GPTQ_BLOCK):
            stop = min(start + GPTQ_BLOCK, len(c))
            before, local, h = c[start:stop].clone(), gradient[start:stop], hessian[start:stop, start:stop]
            for i in range(stop - start):
                row = c[start + i]
                new = (row - local[i] / curvature[start + i]).round_().clamp_(-top, top)
                local.addr_(h[i], new - row)
                row.copy_(new)
            gradient[stop:] += hessian[stop:, start:stop] @ (c[start:stop] - before)
    return c.t().contiguous()


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """(codes - offset) * scale.

    Args:
        codes: [output_size, n], integers in a float dtype.
        scale: [output_size] or [output_size, groups], each entry for n / groups neighbouring columns.
        offset: of the same shape; None for zeros.
    """
    values = codes if offset is None else codes - _per_column(offset, codes)
    return values * _per_column(scale, codes)


def _per_column(grouped: Tensor, codes: Tensor) -> Tensor:
    """[output_size, n], or [output_size, 1] if there is one group."""
    grouped = grouped.reshape(len(codes), -1)
    groups = grouped.shape[1]
    return grouped if groups == 1 else grouped.repeat_interleave(codes.shape[1] // groups, 1)


def round_to_nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of a weight [output_size, n], each rounded to the nearest integer."""
    top = largest_code(bits)
    return (weight / scale).round_().clamp_(-top, top)


def absmax_scale(weight: Tensor, bits: int) -> Tensor:
    """Scale [output_size, 1] with which the largest magnitude of each row gets the largest code."""
    return weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / largest_code(bits)
