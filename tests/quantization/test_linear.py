# SPDX-License-Identifier: Apache-2.0
"""vLLM's real linear layers with our method, loaded tensor by tensor at tensor-parallel rank 0 and 1 of 2.

The oracle is the reference on the whole, unpacked weights; rank r must give its part of it.
"""

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
)

from tests.linears import load
from tests.quantization.linears import IN, KINDS, Linear, assert_near, column_layer, inputs

pytestmark = pytest.mark.usefixtures("vllm_context")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_qkv(make_config: Any, at_rank: Any, kind: str, size: int, bias: bool) -> None:
    head, heads, kv_heads = 16, 4, 2
    q, k, v = (Linear(n * head, kind, i, bias=bias) for i, n in enumerate((heads, kv_heads, kv_heads)))
    config = make_config(q_proj=q, k_proj=k, v_proj=v)
    for rank in range(size):
        at_rank(rank, size)
        layer = QKVParallelLinear(
            IN, head, heads, kv_heads, bias=bias, params_dtype=torch.float32, quant_config=config, prefix="m.qkv_proj"
        )
        load(layer, {"q": q, "k": k, "v": v})
        y, _ = layer(inputs())
        parts = [linear.expected(inputs()).chunk(size, -1)[rank] for linear in (q, k, v)]
        assert_near(y, torch.cat(parts, -1))


def test_key_value_heads_are_replicated_when_there_are_fewer_than_ranks(make_config: Any, at_rank: Any) -> None:
    head, kind = 16, "W4A4_FLATQUANT_DYNAMIC"
    q, k, v = Linear(4 * head, kind, 0), Linear(head, kind, 1), Linear(head, kind, 2)
    config = make_config(q_proj=q, k_proj=k, v_proj=v)
    for rank in range(2):
        at_rank(rank, 2)
        layer = QKVParallelLinear(
            IN, head, 4, 1, bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.qkv_proj"
        )
        load(layer, {"q": q, "k": k, "v": v})
        parts = [q.expected(inputs()).chunk(2, -1)[rank], k.expected(inputs()), v.expected(inputs())]
        assert_near(layer(inputs())[0], torch.cat(parts, -1))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", [64, 40, 14])
def test_merged(make_config: Any, at_rank: Any, kind: str, size: int, out: int) -> None:
    """Sizes 40 and 14 put shard borders inside the kernels' tiles of 16 rows."""
    gate, up = Linear(out, kind, 0), Linear(out, kind, 1)
    config = make_config(gate_proj=gate, up_proj=up)
    for rank in range(size):
        at_rank(rank, size)
        layer = MergedColumnParallelLinear(
            IN, [out, out], bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.gate_up_proj"
        )
        load(layer, {0: gate, 1: up})
        parts = [linear.expected(inputs()).chunk(size, -1)[rank] for linear in (gate, up)]
        assert_near(layer(inputs())[0], torch.cat(parts, -1))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_column_with_groups_and_offsets(make_config: Any, at_rank: Any, groups: int, offset: bool, size: int) -> None:
    linear = Linear(48, "W4A4_DYNAMIC", 0, groups=groups, offset=offset)
    config = make_config(proj=linear)
    for rank in range(size):
        at_rank(rank, size)
        layer = column_layer(config, 48)
        load(layer, {None: linear})
        assert_near(layer(inputs())[0], linear.expected(inputs()).chunk(size, -1)[rank])


@pytest.mark.parametrize("bias", [False, True])
def test_replicated(make_config: Any, at_rank: Any, bias: bool) -> None:
    linear = Linear(40, "W4A4_FLATQUANT_DYNAMIC", 0, bias=bias)
    config = make_config(proj=linear)
    for rank, size in ((0, 1), (1, 2)):
        at_rank(rank, size)
        layer = ReplicatedLinear(IN, 40, bias=bias, params_dtype=torch.float32, quant_config=config, prefix="m.proj")
        load(layer, {None: linear})
        assert_near(layer(inputs())[0], linear.expected(inputs()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_stays_visible(make_config: Any, at_rank: Any, kind: str, value: float) -> None:
    linear = Linear(40, kind, 0, bias=True)
    layer = column_layer(make_config(proj=linear), 40, bias=True)
    load(layer, {None: linear})
    x = inputs()
    expected = layer(x)[0].clone()
    x[4, 7] = value
    found = layer(x)[0]
    assert found[4].isnan().all()
    others = [token for token in range(len(x)) if token != 4]
    assert torch.equal(found[others], expected[others])
