# SPDX-License-Identifier: Apache-2.0
"""vLLM's kernels for norms as implementations of its operators, on CPUs; vLLM itself does not choose them there."""

import torch
from vllm import ir

from vllm_w4a4_plugin.constants import PROVIDER


def register_norms() -> None:
    """Register `rms_norm` and `fused_add_rms_norm` under PROVIDER. Idempotent."""
    if PROVIDER in ir.ops.rms_norm.impls:
        return
    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_norm_is_supported)(rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_fused_norm_is_supported, inplace=True)(
        fused_add_rms_norm
    )


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    """vLLM's kernel for norms: [..., features] of x in its dtype. `variance_size` is None."""
    x = x.contiguous()
    output = torch.empty_like(x)
    torch.ops._C.rms_norm.default(output, x, weight, epsilon)
    return output


def fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's kernel for norms of x + x_residual: (normed, sum), in the memory of x and x_residual."""
    torch.ops._C.fused_add_rms_norm.default(x, x_residual, weight, epsilon)
    return x, x_residual


def _norm_is_supported(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype


def _fused_norm_is_supported(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return _norm_is_supported(x, weight, epsilon, variance_size) and x.is_contiguous() and x_residual.is_contiguous()
