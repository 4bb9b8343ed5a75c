# SPDX-License-Identifier: Apache-2.0
"""Experts of a model as one device computes them, under both of the names that checkpoints use."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_w4a4_plugin.capacity.experts import experts_on_rank
from vllm_w4a4_plugin.capacity.kernels import kernels_of
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.checkpoint.types import QuantType


@pytest.mark.parametrize(
    ("block", "names"),
    [("mlp", ("gate_proj", "up_proj", "down_proj")), ("block_sparse_moe", ("w1", "w3", "w2"))],
)
def test_experts_on_rank(block: str, names: tuple[str, ...]) -> None:
    kind = QuantType.W4A4_DYNAMIC
    linears = [
        LinearSpec(f"model.layers.{layer}.{block}.experts.{expert}.{name}", kind, *sizes)
        for layer in range(2)
        for expert in range(4)
        for name, sizes in zip(names, ((96, 64), (96, 64), (64, 96)), strict=True)
    ]
    other = LinearSpec("model.layers.0.mlp.shared_expert.up_proj", kind, 32, 64)
    model: Any = SimpleNamespace(linears=(*linears, other), head=None, experts=4, kv_heads=2, has_whole_experts=False)
    shapes = experts_on_rank(model, 3)
    assert list(shapes) == [f"model.layers.{layer}.{block}.experts" for layer in range(2)]
    for shape in shapes.values():
        assert (shape.hidden, shape.intermediate, shape.experts) == (64, 32, 4)
    kernels = {k.kernel: k.count for k in kernels_of(model, 1)}
    assert kernels == {"npu_dynamic_quant + npu_grouped_matmul": 24, "npu_dynamic_quant + npu_quant_matmul": 1}
