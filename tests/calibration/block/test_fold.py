# SPDX-License-Identifier: Apache-2.0
"""A folded part of a transform changes nothing: the block computes the same, in every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import FAMILIES, write_model
from vllm_w4a4_plugin.calibration.block import fold
from vllm_w4a4_plugin.calibration.model.block import LoadedBlock
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.calibration.model.structure import Group
from vllm_w4a4_plugin.calibration.transforms.closed_form import Transform


def changed_groups(block: LoadedBlock, change: Callable[[LoadedBlock, Group], bool]) -> list[str]:
    """Keys of the groups that `change` changed; afterwards the block must compute what it did before."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 8, block.model.hidden_size, generator=generator)
    with torch.no_grad():
        expected = block.run(hidden) - hidden
        keys = [key for key, group in block.groups.items() if change(block, group)]
        found = block.run(hidden) - hidden
    assert (found - expected).norm() < 1e-4 * expected.norm()
    return keys


def random_diagonal(size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.5 + 0.5


def into_norm(block: LoadedBlock, group: Group) -> bool:
    if group.norm is None:
        return False
    before = block.module.get_submodule(group.norm).weight.clone()  # type: ignore[operator]
    effective = fold.fold_into_norm(block, group, random_diagonal(block.linear(group.linears[0]).in_features))
    assert not torch.equal(block.module.get_submodule(group.norm).weight, before)  # type: ignore[arg-type]
    for name in group.linears:
        block.linear(name).weight.div_(effective)
    return True


def into_source(block: LoadedBlock, group: Group) -> bool:
    if group.source is None:
        return False
    channels = torch.tensor(group.source.of_input(block.linear(group.linears[0]).in_features))
    diagonal = random_diagonal(group.source.channels)[channels]
    if group.source.mixes:
        size = group.source.head_dim
        right = torch.randn(size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        left = torch.eye(len(channels) // size, dtype=torch.float64)
        fold._fold_heads(block, group, Transform(diagonal, left, right), channels)
    else:
        fold._fold_channels(block, group, diagonal, channels)
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_changes_nothing(family: str, tmp_path: Path) -> None:
    model = StreamedModel(write_model(family, tmp_path))
    block = LoadedBlock(model, 0)
    plain = FAMILIES[family].plain
    expected = [key for key in ("qkv", "gate_up") if key in block.groups and key not in plain]
    assert changed_groups(block, into_norm) == expected
    assert changed_groups(block, into_source) == [key for key in ("o", "down") if key in block.groups]


GATED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                         "shared_expert_intermediate_size": 64, "layer_types": ["full_attention"] * 2}  # fmt: skip


def test_a_gate_behind_attention_leaves_the_scales_of_channels(float_model: Callable[..., Path]) -> None:
    block = LoadedBlock(StreamedModel(float_model("qwen3_next", **GATED)), 0)
    assert block.groups["o"].source is not None
    assert not block.groups["o"].source.mixes
    assert changed_groups(block, into_source) == ["o", "down"]
