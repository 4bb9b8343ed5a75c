# SPDX-License-Identifier: Apache-2.0
"""int8 weights with activations of 15 bits, against float64."""

import numpy as np
import pytest
import torch

from vllm_w4a4_plugin import ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def make_weight(out: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out)
    weight = torch.randint(-128, 128, (out, features), dtype=torch.int8, generator=generator)
    packed = torch.zeros(ops.packed_int8_shape(out, features), dtype=torch.int8)
    ops.pack_int8_rows_(packed, weight, 0)
    return weight, packed


@DTYPES
@pytest.mark.parametrize(("out", "features"), [(1, 8), (50, 192), (1033, 77), (40, 1100)])
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 20, 130])
def test_close_to_float64(dtype: torch.dtype, out: int, features: int, tokens: int) -> None:
    x, (weight, packed), scale, bias = (
        random(tokens, features).to(dtype),
        make_weight(out, features),
        random(out).abs(),
        random(out),
    )
    y = ops.split_linear(x, packed, scale, bias)
    assert y.dtype is dtype
    assert y.shape == (tokens, out)
    exact_x, exact_weight = x.double().numpy(), weight.double().numpy() * scale.double().numpy()[:, None]
    expected = exact_x @ exact_weight.T + bias.double().numpy()
    # Each value of a token is off by half a step at most, and the result by its rounding to the dtype.
    step = np.abs(exact_x).max(1, initial=0.0, keepdims=True) / 16256
    off = step / 2 * np.abs(exact_weight).sum(1) * 1.001 + 1e-5 * np.abs(expected).max(initial=0.0)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert (np.abs(y.double().numpy() - expected) <= off + rounding * np.abs(expected)).all()


def test_as_the_reference() -> None:
    x, (weight, packed), scale = random(5, 192), make_weight(50, 192), random(50).abs()
    expected = ops.reference.split_linear(x, weight, scale)
    assert torch.allclose(ops.split_linear(x, packed, scale), expected, rtol=1e-5, atol=1e-4)


def test_the_largest_values_are_exact() -> None:
    """At the ends of the ranges, where a sum or a half would overflow first."""
    features = 1024
    weight = torch.full((17, features), -128, dtype=torch.int8)
    packed = torch.zeros(ops.packed_int8_shape(17, features), dtype=torch.int8)
    ops.pack_int8_rows_(packed, weight, 0)
    x = torch.tensor([16256.0, -16256.0, 16255.0, -16255.0])[:, None].expand(4, features).clone()
    x[2:, 0] = 16256.0
    y = ops.split_linear(x, packed, torch.ones(17))
    assert torch.equal(y, (x.double() @ weight.double().T).float())


def test_a_token_that_is_not_finite_spoils_only_itself() -> None:
    x, (_, packed), scale = random(4, 192), make_weight(50, 192), random(50).abs()
    clean = ops.split_linear(x, packed, scale)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = ops.split_linear(x, packed, scale)
    assert y[1:3].isnan().all()
    assert torch.equal(y[[0, 3]], clean[[0, 3]])


def test_zeros_give_the_bias() -> None:
    _, packed = make_weight(50, 192)
    bias = random(50)
    assert torch.equal(ops.split_linear(torch.zeros(2, 192), packed, torch.ones(50), bias), bias.expand(2, 50))


def test_a_token_alone_has_the_same_bits() -> None:
    x, (_, packed), scale = random(20, 192), make_weight(50, 192), random(50).abs()
    together = ops.split_linear(x, packed, scale)
    assert torch.equal(together, torch.cat([ops.split_linear(token[None], packed, scale) for token in x]))


@DTYPES
def test_opcheck(dtype: torch.dtype) -> None:
    x, (_, packed) = random(3, 192).to(dtype), make_weight(50, 192)
    torch.library.opcheck(torch.ops.vllm_w4a4.split_linear, (x, packed, torch.ones(50), torch.ones(50)))


def test_wrong_shapes_are_errors() -> None:
    _, packed = make_weight(50, 192)
    with pytest.raises(RuntimeError, match="weight_packed: expected"):
        ops.split_linear(random(2, 64), packed, torch.ones(50))
    with pytest.raises(RuntimeError, match="weight_scale: expected one value per output feature"):
        ops.split_linear(random(2, 192), packed, torch.ones(50, 2))
