# SPDX-License-Identifier: Apache-2.0
"""The first time that a process uses the CPU kernels, small layers tell whether they compute on this CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.constants import INT4_MAX, INT4_MIN

from . import api, cpu, packing, reference
from .layout import packed_int4_shape, packed_int8_shape

TOKENS = (1, 17)
LEFT, RIGHT, OUTPUT_SIZE = 12, 16, 40
TOLERATED_ERROR = 3e-2
"""Relative; a correct kernel rounds its output to 16 bits and a few int4 values to the other side of a tie."""


def require_working_kernels(dtype: torch.dtype, weight_bits: int = 4, experts: bool = False) -> None:
    """Check the kernels for activations of a dtype, once a process, unless VLLM_W4A4_SELF_CHECK=0.

    Args:
        dtype: of the activations.
        weight_bits: 4 for `flatquant_linear`, 8 for `w8a8_linear`.
        experts: whether `experts_mlp` with such weights is checked instead.

    Raises:
        RuntimeError: they compute wrong results.
    """
    if envs.VLLM_W4A4_SELF_CHECK:
        _require_working_kernels(dtype, weight_bits, experts)


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
def _require_working_kernels(dtype: torch.dtype, weight_bits: int, experts: bool) -> None:
    error_of = _int4_error if weight_bits == 4 else _int8_error
    if experts:
        error_of = partial(_experts_error, weight_bits=weight_bits)
    # While vLLM makes a model, the model's dtype is torch's default.
    with torch.no_grad(), torch.device("cpu"), default_dtype(torch.float32):
        errors = torch.tensor([error_of(tokens, dtype) for tokens in TOKENS])
    error = errors.max().item()  # NaN if one of them is
    if not error <= TOLERATED_ERROR:
        others = [name for name in cpu.cpu_available_instruction_sets() if name != cpu.cpu_instruction_set()]
        raise RuntimeError(
            f"The int{weight_bits} kernels{' of experts' * experts} for {cpu.cpu_instruction_set()} compute wrong "
            f"results on this CPU (relative error {error:.2g}). Choose others with VLLM_W4A4_ISA, one of "
            f"{', '.join(others) or 'portable'}, and "
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
    found = api.flatquant_linear(x, packing.pack_int4(weight), weight_scale, left, right, clip_ratio, bias)
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
    packing.pack_int8_rows_(packed, weight, 0)
    found = api.w8a8_linear(x, packed, weight_scale, bias)
    return _relative(found, reference.w8a8_linear(x.float(), weight, weight_scale, bias))


def _experts_error(tokens: int, dtype: torch.dtype, weight_bits: int) -> float:
    generator = torch.Generator().manual_seed(tokens)
    count, hidden, intermediate = 3, LEFT * RIGHT, OUTPUT_SIZE
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weights, ids = torch.rand(tokens, count, generator=generator).topk(2)
    limit = 2 ** (weight_bits - 1)
    shape, pack = packed_int4_shape, packing.pack_int4_rows_
    if weight_bits == 8:
        shape, pack = packed_int8_shape, packing.pack_int8_rows_
    matrices, scales, packed = {}, {}, {}
    for name, size in (("w13", (2 * intermediate, hidden)), ("w2", (hidden, intermediate))):
        matrices[name] = torch.randint(-limit, limit, (count, *size), generator=generator).to(torch.int8)
        scales[name] = (torch.rand(count, size[0], generator=generator) + 0.1) / limit / size[1] ** 0.5
        packed[name] = torch.zeros(count, *shape(*size), dtype=torch.int8)
        for expert in range(count):
            pack(packed[name][expert], matrices[name][expert], 0)
    found = api.experts_mlp(x, weights, ids, packed["w13"], scales["w13"], packed["w2"], scales["w2"])

    def linear(name: str, tokens: torch.Tensor, expert: int) -> torch.Tensor:
        weight, scale = matrices[name][expert], scales[name][expert]
        if weight_bits == 8:
            return reference.w8a8_linear(tokens, weight, scale)
        return reference.flatquant_linear(tokens, weight, scale, None, None)

    expected = reference.experts_mlp(x.float(), weights, ids, partial(linear, "w13"), partial(linear, "w2"))
    return _relative(found, expected)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()
