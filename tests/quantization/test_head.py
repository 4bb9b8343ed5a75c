# SPDX-License-Identifier: Apache-2.0
"""The output head in integers as a method of a layer, without an engine."""

import pytest
import torch

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.quantization.head import CLIPS, RotatedHeadMethod, rotate, rotation, round_to_int8


class Head(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def by_formula(x: torch.Tensor, weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The logits in float64: weight and token rotated by the same matrix, then rounded."""
    left, right = rotation(weight.shape[1])
    matrix = torch.kron(left.double(), right.double())
    rotated = (weight.double() @ matrix).reshape(weight.shape[0], -1, group)
    largest = rotated.abs().amax(2, keepdim=True)
    if bits == 8:
        best = (rotated / (largest / 127)).round() * (largest / 127)
    else:
        tries = torch.stack(
            [(rotated / (largest * clip / 7)).round().clamp(-8, 7) * (largest * clip / 7) for clip in CLIPS]
        )
        least = (tries - rotated).square().sum(3, keepdim=True).argmin(0, keepdim=True)
        best = tries.gather(0, least.expand(1, *rotated.shape))[0]
    token = x.double() @ matrix
    step = token.abs().amax(1, keepdim=True) / 127
    return (token / step).round() * step @ best.reshape(weight.shape).nan_to_num(0).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [40, 4096 + 70])
@pytest.mark.parametrize(("bits", "features", "group"), [(8, 96, 96), (8, 62, 62), (4, 128, 64), (4, 96, 96)])
def test_close_to_the_formula(dtype: torch.dtype, rows: int, bits: int, features: int, group: int) -> None:
    head, method = Head(random(rows, features).to(dtype)), RotatedHeadMethod(bits)
    x = random(3, features).to(dtype)
    head.weight[5] = 0.0  # vLLM pads the vocabulary with rows of zeros
    method.process_weights_after_loading(head)
    expected = by_formula(x, head.weight, bits, group)
    limit = 2**-7 if dtype is torch.bfloat16 else 3e-3  # a value that is rounded the other way
    assert (method.apply(head, x).double() - expected).norm() < limit * expected.norm()
    assert torch.equal(method.apply(head, x)[:, 5], torch.zeros(3, dtype=dtype))


def test_large_activations_cost_no_precision() -> None:
    head, method, x = Head(random(500, 576)), RotatedHeadMethod(8), random(4, 576)
    x[:, 17] *= 100.0  # would leave 6 of 127 steps to the others
    method.process_weights_after_loading(head)
    exact = x.double() @ head.weight.double().T
    others = (x.double() - torch.where(torch.arange(576) == 17, x.double(), 0.0)) @ head.weight.double().T
    assert (method.apply(head, x).double() - exact).norm() < 0.2 * others.norm()


@pytest.mark.parametrize("features", [1, 7, 62, 96, 576, 2048, 2560, 5120])
def test_the_rotation_keeps_products(features: int) -> None:
    x, y = random(2, features), random(3, features)
    product = rotate(x, *rotation(features)) @ rotate(y, *rotation(features)).T
    assert torch.allclose(product, x @ y.T, atol=1e-4 * features)


def test_weights_can_be_loaded_again() -> None:
    head, method, x = Head(random(40, 96)), RotatedHeadMethod(8), random(3, 96)
    method.process_weights_after_loading(head)
    before, place = method.apply(head, x), head.head_weight_packed.data_ptr()
    head.weight.copy_(2 * head.weight)
    method.process_weights_after_loading(head)
    assert torch.allclose(method.apply(head, x), 2 * before)
    assert head.head_weight_packed.data_ptr() == place


def test_a_bias_of_the_head_and_one_of_the_call() -> None:
    head, method, x = Head(random(40, 96)), RotatedHeadMethod(8), random(3, 96)
    method.process_weights_after_loading(head)
    plain = method.apply(head, x)
    head.bias = torch.nn.Parameter(random(40), requires_grad=False)
    assert torch.allclose(method.apply(head, x), plain + head.bias, atol=1e-5)
    assert torch.allclose(method.apply(head, x, torch.ones(40)), plain + 1, atol=1e-5)


def test_vllms_default_dtype_while_it_loads_does_not_matter() -> None:
    head, method, x = Head(random(40, 96).bfloat16()), RotatedHeadMethod(8), random(3, 96).bfloat16()
    torch.set_default_dtype(torch.bfloat16)
    try:
        method.process_weights_after_loading(head)
    finally:
        torch.set_default_dtype(torch.float32)
    assert head.head_weight_scale.dtype is torch.float32
    assert method.apply(head, x).dtype is torch.bfloat16


def test_only_parameters_of_vllm_are_state() -> None:
    head = Head(random(40, 96))
    RotatedHeadMethod(8).process_weights_after_loading(head)
    assert list(head.state_dict()) == ["weight"]


def test_rows_use_the_whole_range() -> None:
    q, scale = round_to_int8(random(7, 50))
    assert (q.abs().amax(1) == 127).all()
    assert (scale > 0).all()


def test_another_value_of_the_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_W4A4_HEAD", "int3")
    with pytest.raises(ValueError, match="VLLM_W4A4_HEAD: expected int8, int4 or float, found 'int3'"):
        _ = envs.VLLM_W4A4_HEAD
