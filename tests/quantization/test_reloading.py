# SPDX-License-Identifier: Apache-2.0
"""Loading other tensors into the same layer, any number of times, directly and by vLLM's layerwise reload."""

from typing import Any

import pytest
import torch

from tests.linears import load
from tests.quantization.linears import KINDS, Linear, assert_near, column_layer, inputs, merged_pair
from vllm_w4a4_plugin.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("vllm_context")


def test_loading_again_replaces_everything(make_config: Any, at_rank: Any) -> None:
    first, second = (Linear(40, "W4A4_FLATQUANT_DYNAMIC", i, offset=bool(i)) for i in range(2))
    second.clip_ratio = torch.tensor([0.7])
    config = make_config(proj=first)
    layer = column_layer(config, 40)
    for linear in (first, second, first):
        load(layer, {None: linear})
        assert_near(layer(inputs())[0], linear.expected(inputs()))


def test_vllms_layerwise_reload(make_config: Any, at_rank: Any) -> None:
    """vLLM's own machinery: counts elements on the meta device, loads a layer when all its tensors have come."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    layer, gate, up = merged_pair(make_config)
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    load(layer, {0: gate, 1: up})
    storage = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}

    def reload(linears: dict[int, Linear], leave_out: str = "") -> None:
        initialize_layerwise_reload(model)
        for shard, linear in linears.items():
            for name, tensor in linear.tensors().items():
                if f"{shard}.{name}" != leave_out:
                    parameter = getattr(layer, name)
                    parameter.weight_loader(parameter, tensor, shard)
        finalize_layerwise_reload(model, None)

    other = {0: Linear(16, KINDS[0], 7), 1: Linear(16, KINDS[0], 8)}
    for linear in other.values():
        linear.left_trans, linear.clip_ratio = gate.left_trans.flip(0).contiguous(), torch.tensor([0.8])
    for linears in (other, {0: gate, 1: up}):
        reload(linears)
        assert_near(layer(inputs())[0], torch.cat([linears[i].expected(inputs()) for i in range(2)], -1))
    # A compiled graph keeps the storage it was compiled with.
    assert storage == {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    with pytest.raises(CheckpointError, match=r"m\.up_proj\.clip_ratio"):
        reload(other, leave_out="1.clip_ratio")
