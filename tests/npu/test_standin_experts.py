# SPDX-License-Identifier: Apache-2.0
"""The stand-in's operators of experts refuse what the documents exclude and compute what they say."""

from typing import Any

import numpy as np
import pytest
import torch
import torch_npu

BF16 = torch.bfloat16


def packed(values: np.ndarray) -> torch.Tensor:
    """int4 values to int32 words, the first one lowest, byte by byte."""
    low, high = values[..., 0::2] & 15, values[..., 1::2] & 15
    return torch.from_numpy((low | high << 4).astype(np.uint8).copy().view(np.int32))


def operands(groups: int = 1) -> dict[str, Any]:
    """Arguments of npu_grouped_matmul for three experts, 16 inputs and 8 outputs, as numpy knows them too."""
    generator = np.random.default_rng(0)
    q, weight = (generator.integers(-8, 8, shape) for shape in ((7, 16), (3, 16, 8)))
    # Powers of two: nothing is rounded but the result.
    scale = np.float32(2.0) ** generator.integers(-6, 0, (3, groups, 8)).astype(np.float32)
    words = torch.from_numpy(scale.view(np.uint32).astype(np.int64))
    return {
        "q": q,
        "weights": weight,
        "scales": scale,
        "x": [packed(q)],
        "weight": [packed(weight)],
        "scale": [words if groups > 1 else words[:, 0]],
        "per_token_scale": [torch.full((7,), 0.5)],
        "group_list": torch.tensor([2, 2, 6]),
        "split_item": 2,
        "group_type": 0,
        "output_dtype": torch.float16,
    }


def call(arguments: dict[str, Any]) -> torch.Tensor:
    return torch_npu.npu_grouped_matmul(
        **{key: value for key, value in arguments.items() if key not in ("q", "weights", "scales")}
    )[0]


@pytest.mark.parametrize("groups", [1, 4])
def test_grouped_int4_products(groups: int) -> None:
    arguments = operands(groups)
    expected = np.empty((6, 8))
    for row in range(6):
        expert = 0 if row < 2 else 2
        scale = np.repeat(arguments["scales"][expert], 16 // groups, 0)
        expected[row] = arguments["q"][row] @ (arguments["weights"][expert] * scale) / 2
    found = call(arguments)
    assert np.array_equal(found[:6].double().numpy(), expected.astype(np.float16))
    assert found[6].isnan().all()  # no expert's
    arguments |= {"group_list": torch.tensor([2, 0, 4]), "group_list_type": 1}
    assert torch.equal(call(arguments)[:6], found[:6])


def test_only_nineteen_bits_of_a_scale_count() -> None:
    arguments = operands()
    before = call(arguments)
    arguments["scale"] = [arguments["scale"][0] | 0x1FFF]
    assert torch.equal(call(arguments)[:6], before[:6])
    arguments["scale"] = [arguments["scale"][0] | 0x2000]
    assert not torch.equal(call(arguments)[:6], before[:6])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"bias": [torch.zeros(3, 8)]}, "bias must be null"),
        ({"scale": [torch.ones(3, 8)]}, "scale must be one int64 tensor"),
        ({"scale": [torch.full((3, 8), 1 << 46)]}, "upper 32 bits"),
        ({"group_list": torch.tensor([2, 1, 6])}, "group_list"),
        ({"group_list": torch.tensor([2, 2, 8])}, "group_list"),
        ({"group_list": torch.tensor([2, 2, 6], dtype=torch.int32)}, "group_list must be int64"),
        ({"output_dtype": torch.float32}, "output_dtype must be float16 or bfloat16"),
        ({"per_token_scale": [torch.ones(6)]}, "per_token_scale"),
        ({"split_item": 0}, "only one tensor each"),
    ],
)
def test_what_the_documents_exclude(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(RuntimeError, match=problem):
        call({**operands(), **change})


def test_weights_must_not_be_transposed() -> None:
    arguments = operands()
    arguments["weight"] = [torch.zeros(3, 2, 16, dtype=torch.int32).transpose(1, 2)]
    with pytest.raises(RuntimeError, match="must not be transposed"):
        call(arguments)


def test_grouped_float_products() -> None:
    x, weight = torch.arange(12.0).view(6, 2).to(BF16), torch.arange(12.0).view(3, 2, 2).to(BF16)
    ends = torch.tensor([1, 1, 5])
    (found,) = torch_npu.npu_grouped_matmul([x], [weight], group_list=ends, split_item=2, group_type=0)
    assert torch.equal(found[:1], x[:1] @ weight[0])
    assert torch.equal(found[1:5], x[1:5] @ weight[2])


def test_routing_and_its_inverse() -> None:
    """Experts 1 and 2 of four; what goes elsewhere has no row and no weight."""
    x = torch.tensor([[1.0], [2.0], [3.0]], dtype=BF16)
    ids = torch.tensor([[2, 0], [1, 2], [3, 1]], dtype=torch.int32)
    rows, places, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x, ids, active_num=6, expert_num=4, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[1, 3], quant_mode=-1,
    )  # fmt: skip
    assert rows[:4, 0].tolist() == [2, 3, 1, 2]
    assert rows[4:].isnan().all()
    assert places.tolist() == [2, -1, 0, 3, -1, 1]
    assert counts.tolist() == [2, 2]
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.25], [0.0, 2.0]])
    y = torch_npu.npu_moe_token_unpermute(rows.nan_to_num(), places.abs(), probs)
    assert y[:, 0].tolist() == [1.0, 1.5, 6.0]


def test_swiglu() -> None:
    x = torch.tensor([[0.0, 1.0, 5.0, 2.0]], dtype=BF16)
    assert torch_npu.npu_swiglu(x).tolist() == [[0.0, pytest.approx(2 / (1 + np.exp(-1)), rel=4e-3)]]
