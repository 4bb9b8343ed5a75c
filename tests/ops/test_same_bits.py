# SPDX-License-Identifier: Apache-2.0
"""A token has the same output, to the bit, in any batch and with any number of threads, for one instruction set."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.ops.test_experts import KINDS, Experts
from vllm_w4a4_plugin import ops
from vllm_w4a4_plugin.ops import api

TOKENS = 70
THREADS = (1, 2, 3, 5)
OUT = 50
SIZES = {(12, 16): 192, (24, 48): 1152, (72, 80): 5760}
"""Kronecker factors -> input features. With the largest, the threads share the transform of one token."""

Operator = Callable[[Tensor], Tensor]
"""From activations [tokens, features] to [tokens, ...]."""


@pytest.fixture(autouse=True)
def number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


def int8_packed(rows: int, features: int) -> Tensor:
    packed = torch.zeros(ops.packed_int8_shape(rows, features), dtype=torch.int8)
    ops.pack_int8_rows_(packed, integers(-128, 128, rows, features), 0)
    return packed


def operators(factors: tuple[int, int]) -> dict[str, Operator]:
    """Every operator, with its weights for one input size."""
    features = SIZES[factors]
    transform = (random(factors[0], factors[0]), random(factors[1], factors[1]), torch.tensor([0.9]))
    int4, int8 = ops.pack_int4(integers(-8, 8, OUT, features)), int8_packed(OUT, features)
    scale, grouped, offset, bias = random(OUT).abs(), random(OUT, 4).abs(), random(OUT, 4), random(OUT)
    codes = integers(-8, 8, TOKENS, features)

    def quantized(x: Tensor) -> Tensor:
        q, token_scale = ops.kronecker_quant(x, *transform)
        return torch.cat([q.float(), token_scale[:, None]], 1)

    def whole(kind: str) -> Operator:
        def run(x: Tensor) -> Tensor:
            places = x[:, 0].long()  # of the tokens among `codes`; see `test_integers`
            arguments = (codes[places].contiguous(), random(TOKENS).abs()[places].contiguous())
            if kind == "int4":
                return ops.int4_linear(*arguments, int4, grouped, bias, offset, torch.float32)
            return ops.int8_linear(*arguments, int8, scale, bias, None, torch.float32)

        return run

    return {
        "flatquant_linear": lambda x: ops.flatquant_linear(x, int4, scale, *transform, bias),
        "flatquant_linear, groups": lambda x: ops.flatquant_linear(
            x, int4, grouped, *transform, bias, weight_offset=offset
        ),
        "flatquant_linear, 8 bits": lambda x: ops.flatquant_linear(x, int4, scale, *transform, bias, activation_bits=8),
        "flatquant_linear, no transform": lambda x: ops.flatquant_linear(x, int4, scale, None, None, 1.0),
        "kronecker_quant": quantized,
        "w8a8_linear": lambda x: ops.w8a8_linear(x, int8, scale, bias),
        "w8a8_linear, transform": lambda x: ops.w8a8_linear(x, int8, scale, bias, *transform),
        "weight_only_linear": lambda x: ops.weight_only_linear(x, int4, grouped, bias, offset),
        "silu_and_mul": api.silu_and_mul,
        "int4_linear": whole("int4"),
        "int8_linear": whole("int8"),
    }


def check(operator: Operator, x: Tensor) -> None:
    """Compare batches of several sizes, and tokens at several places of them, for every number of threads."""
    torch.set_num_threads(1)
    expected = operator(x)
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert torch.equal(operator(x), expected), f"{threads} threads"
        for first, size in ((0, 1), (41, 1), (69, 1), (7, 2), (3, 7), (11, 8), (20, 9), (13, 16), (2, 33), (5, 64)):
            part = operator(x[first : first + size].contiguous())
            assert torch.equal(part, expected[first : first + size]), f"{threads} threads, tokens {first} + {size}"


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
NAMES = [name for name in operators((12, 16)) if name not in ("int4_linear", "int8_linear")]


@DTYPES
@pytest.mark.parametrize("factors", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_float_activations(name: str, factors: tuple[int, int], dtype: torch.dtype) -> None:
    check(operators(factors)[name], random(TOKENS, SIZES[factors]).to(dtype))


@pytest.mark.parametrize("name", ["int4_linear", "int8_linear"])
def test_integers(name: str) -> None:
    """Of operators that take integers and a scale: the batch consists of the numbers of their tokens."""
    check(operators((12, 16))[name], torch.arange(TOKENS, dtype=torch.float32)[:, None])


@pytest.mark.parametrize("kind", KINDS)
def test_experts(kind: str) -> None:
    """The batch consists of the numbers of its tokens, each of which has its own routing."""
    experts = Experts(**KINDS[kind])  # type: ignore[arg-type]
    x, (weights, ids) = experts.tokens(TOKENS), experts.routing(TOKENS, 3)

    def run(numbers: Tensor) -> Tensor:
        places = numbers[:, 0].long()
        return experts.run(x[places], weights[places], ids[places])

    check(run, torch.arange(TOKENS, dtype=torch.float32)[:, None])
