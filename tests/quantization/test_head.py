# SPDX-License-Identifier: Apache-2.0
"""The int8 output head as a method of a layer, without an engine."""

import pytest
import torch

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.quantization.head import Int8HeadMethod, quantize_rows


class Head(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """The weight that an int8 head stands for, by its formula."""
    step = weight.double().abs().max(1, keepdim=True).values / 127
    return torch.where(step > 0, torch.round(weight.double() / step) * step, torch.zeros((), dtype=torch.double))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [40, 4096 + 70])
def test_close_to_the_rounded_weight(dtype: torch.dtype, rows: int) -> None:
    head, method, x = Head(random(rows, 96).to(dtype)), Int8HeadMethod(), random(3, 96).to(dtype)
    head.weight[5] = 0.0  # vLLM pads the vocabulary with rows of zeros
    method.process_weights_after_loading(head)
    expected = x.double() @ rounded(head.weight).T
    limit = 2**-8 if dtype is torch.bfloat16 else 1e-3
    assert (method.apply(head, x).double() - expected).norm() < limit * expected.norm()
    assert torch.equal(method.apply(head, x)[:, 5], torch.zeros(3, dtype=dtype))


def test_weights_can_be_loaded_again() -> None:
    head, method, x = Head(random(40, 96)), Int8HeadMethod(), random(3, 96)
    method.process_weights_after_loading(head)
    before, place = method.apply(head, x), head.int8_weight.data_ptr()
    head.weight.copy_(2 * head.weight)
    method.process_weights_after_loading(head)
    assert torch.allclose(method.apply(head, x), 2 * before)
    assert head.int8_weight.data_ptr() == place


def test_a_bias_of_the_head_and_one_of_the_call() -> None:
    head, method, x = Head(random(40, 96)), Int8HeadMethod(), random(3, 96)
    method.process_weights_after_loading(head)
    plain = method.apply(head, x)
    head.bias = torch.nn.Parameter(random(40), requires_grad=False)
    assert torch.allclose(method.apply(head, x), plain + head.bias, atol=1e-5)
    assert torch.allclose(method.apply(head, x, torch.ones(40)), plain + 1, atol=1e-5)


def test_vllms_default_dtype_while_it_loads_does_not_matter() -> None:
    head, method, x = Head(random(40, 96).bfloat16()), Int8HeadMethod(), random(3, 96).bfloat16()
    torch.set_default_dtype(torch.bfloat16)
    try:
        method.process_weights_after_loading(head)
    finally:
        torch.set_default_dtype(torch.float32)
    assert head.int8_weight_scale.dtype is torch.float32
    assert method.apply(head, x).dtype is torch.bfloat16


def test_only_parameters_of_vllm_are_state() -> None:
    head = Head(random(40, 96))
    Int8HeadMethod().process_weights_after_loading(head)
    assert list(head.state_dict()) == ["weight"]


def test_rows_use_the_whole_range() -> None:
    q, scale = quantize_rows(random(7, 50))
    assert (q.abs().amax(1) == 127).all()
    assert (scale > 0).all()


def test_another_value_of_the_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_W4A4_HEAD", "int3")
    with pytest.raises(ValueError, match="VLLM_W4A4_HEAD: expected int8 or float, found 'int3'"):
        _ = envs.VLLM_W4A4_HEAD
