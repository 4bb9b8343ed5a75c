# SPDX-License-Identifier: Apache-2.0
"""The first time that a process uses the CPU kernels, two small linears tell whether they compute on this CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.constants import INT4_MAX, INT4_MIN

from . import api, cpu, reference
from .layout import packed_int8_shape

TOKENS = (1, 17)
LEFT, RIGHT, OUTPUT_SIZE = 12, 16, 40
TOLERATED_ERROR = 3e-2
"""Relative; a correct kernel rounds its output to 16 bits and a few int4 values to the other side of a tie."""


def require_working_kernels(dtype: torch.dtype, weight_bits: int = 4) -> None:
    """Check the kernels for activations of a dtype, once a process, unless VLLM_W4A4_SELF_CHECK=0.

    Args:
        dtype: of the activations.
        weight_bits: 4 for `flatquant_linear`, 8 for `w8a8_linear`.

    Raises:
        RuntimeError: they compute wrong results.
    """
    if envs.VLLM_W4A4_SELF_CHECK:
        _require_working_kernels(dtype, weight_bits)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make `dtype` torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
def _require_working_kernels(dtype: torch.dtype, weight_bits: int) -> None:
    error_of = _int4_error if weight_bits == 4 else _int8_error
    # While vLLM makes a model, the model's dtype is torch's default.
    with torch.no_grad(), torch.device("cpu"), default_dtype(torch.float32):
        errors = torch.tensor([error_of(tokens, dtype) for tokens in TOKENS])
    error = errors.max().item()  # NaN if one of them is
    if not error <= TOLERATED_ERROR:
        others = [name for name in cpu.cpu_available_instruction_sets() if name != cpu.cpu_instruction_set()]
        raise RuntimeError(
            f"The int{weight_bits} kernels for {cpu.cpu_instruction_set()} compute wrong results on this CPU (relative "
            f"error {error:.2g}). Choose others with VLLM_W4A4_ISA, one of {', '.join(others) or 'portable'}, and "
            "please report it. VLLM_W4A4_SELF_CHECK=0 skips this check."
        )


def _int4_error(tokens: int, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(tokens)
    features = LEFT * RIGHT
    x = torch.randn(tokens, features, generator=generator).to(dtype)
    weight = torch.randint(INT4_MIN, INT4_MAX + 1, (OUTPUT_SIZE, features), generator=generator).to(torch.int8)
    weight_scale = torch.rand(OUTPUT_SIZE, generator=generator) + 0.1
    left, right = (torch.randn(size, size, generator=generator) for size in (LEFT, RIGHT))
    clip_ratio, bias = 0.75, torch.randn(OUTPUT_SIZE, generator=generator)
    found = api.flatquant_linear(x, api.pack_int4(weight), weight_scale, left, right, clip_ratio, bias)
    return _relative(found, reference.flatquant_linear(x.float(), weight, weight_scale, left, right, clip_ratio, bias))


def _int8_error(tokens: int, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(tokens)
    features = LEFT * RIGHT
    x = torch.randn(tokens, features, generator=generator).to(dtype)
    weight = torch.randint(-128, 128, (OUTPUT_SIZE, features), generator=generator).to(torch.int8)
    weight_scale, bias = (
        torch.rand(OUTPUT_SIZE, generator=generator) + 0.1,
        torch.randn(OUTPUT_SIZE, generator=generator),
    )
    packed = torch.zeros(packed_int8_shape(OUTPUT_SIZE, features), dtype=torch.int8)
    api.pack_int8_rows_(packed, weight, 0)
    found = api.w8a8_linear(x, packed, weight_scale, bias)
    return _relative(found, reference.w8a8_linear(x.float(), weight, weight_scale, bias))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()
