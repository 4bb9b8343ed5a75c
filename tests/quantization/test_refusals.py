# SPDX-License-Identifier: Apache-2.0
"""Layers and tensors that are refused, before, while and after they are loaded into vLLM's real linear layers."""

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

from tests.linears import load
from tests.quantization.linears import IN, LEFT, Linear, column_layer, merged_pair
from vllm_w4a4_plugin.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("vllm_context")


def test_groups_that_ranks_would_cut_are_refused(
    make_config: Any, at_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_W4A4_LOCAL_SCALES", "1")
    config = make_config(proj=Linear(40, "W4A4_DYNAMIC", 0, groups=3))
    at_rank(0, 2)
    with pytest.raises(CheckpointError, match=r"m\.proj: 96 .* group size 64.*tensor-parallel-size"):
        RowParallelLinear(IN, 40, bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.proj")


def test_transforms_of_fused_shards_must_be_equal(make_config: Any, at_rank: Any) -> None:
    layer, gate, up = merged_pair(make_config)
    up.right_trans = up.right_trans.clone()
    up.right_trans[3, 4] += 1e-6
    with pytest.raises(
        CheckpointError, match=r"m\.gate_up_proj, tensor m\.up_proj\.right_trans: .*m\.gate_proj\.right_trans"
    ):
        load(layer, {0: gate, 1: up})


def test_clips_of_fused_shards_must_be_near(make_config: Any, at_rank: Any) -> None:
    layer, gate, up = merged_pair(make_config)
    up.clip_ratio = torch.tensor([0.95])
    with pytest.raises(CheckpointError, match=r"m\.gate_up_proj: .*m\.up_proj\.clip_ratio: 0\.95"):
        load(layer, {0: gate, 1: up})


@pytest.mark.parametrize("missing", ["weight", "weight_scale", "left_trans", "clip_ratio"])
def test_a_parameter_that_no_tensor_filled_is_an_error(make_config: Any, at_rank: Any, missing: str) -> None:
    layer, gate, up = merged_pair(make_config)
    incomplete = {name: tensor for name, tensor in up.tensors().items() if name != missing}
    up.tensors = lambda: incomplete  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=rf"m\.gate_up_proj: .*{missing}.*m\.up_proj\.{missing}"):
        load(layer, {0: gate, 1: up})


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("weight", torch.full((16, IN), 8, dtype=torch.int8), "expected int4 values in"),
        ("weight", torch.zeros(16, IN), "expected int8, found torch.float32"),
        ("weight", torch.zeros(16, IN + 8, dtype=torch.int8), "expected shape \\[16, 192\\], found \\[16, 200\\]"),
        ("weight", torch.zeros(15, IN, dtype=torch.int8), "expected shape \\[16, 192\\], found \\[15, 192\\]"),
        ("weight_scale", torch.full((16, 1), float("nan")), "expected finite values"),
        ("left_trans", torch.zeros(LEFT + 1, LEFT + 1), r"expected shape \[12, 12\], found \[13, 13\]"),
        ("clip_ratio", torch.tensor([1.5]), r"expected a clip ratio in \(0, 1\], found 1.5"),
    ],
)
def test_bad_tensors_are_refused_as_they_arrive(
    make_config: Any, at_rank: Any, name: str, tensor: torch.Tensor, words: str
) -> None:
    layer, _, _ = merged_pair(make_config)
    parameter = getattr(layer, name)
    with pytest.raises(
        CheckpointError, match=rf"model.safetensors: layer m\.gate_up_proj, tensor m\.up_proj\.{name}: {words}"
    ):
        parameter.weight_loader(parameter, tensor, 1)


def test_asymmetric_int8_weights_are_refused(make_config: Any, at_rank: Any) -> None:
    linear = Linear(16, "W8A8_DYNAMIC", 0, offset=True)
    config = make_config(proj=linear)
    layer = column_layer(config, 16)
    with pytest.raises(CheckpointError, match=r"m\.proj\.weight_offset: expected zeros"):
        load(layer, {None: linear})


@pytest.mark.parametrize("in_checkpoint", [True, False])
def test_a_bias_on_one_side_only_is_an_error(make_config: Any, at_rank: Any, in_checkpoint: bool) -> None:
    linear = Linear(16, "W4A4_DYNAMIC", 0, bias=in_checkpoint)
    config = make_config(proj=linear)
    layer = column_layer(config, 16, bias=not in_checkpoint)
    linear.bias = None
    with pytest.raises(CheckpointError, match=r"m\.proj\.bias: checkpoint has"):
        load(layer, {None: linear})


def test_input_size_must_fit_the_model(make_config: Any, at_rank: Any) -> None:
    config = make_config(proj=Linear(16, "W4A4_DYNAMIC", 0))
    with pytest.raises(
        CheckpointError, match=r"m\.proj\.weight: expected 256 input features \(config\.json\), found 192"
    ):
        ColumnParallelLinear(256, 16, bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.proj")
