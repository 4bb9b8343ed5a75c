# SPDX-License-Identifier: Apache-2.0
"""What is undone in a block because it is worse than rounding to nearest on held-out rows."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_w4a4_plugin.calibration.activations import Activations
from vllm_w4a4_plugin.calibration.block import fold, group, guard, quantizer
from vllm_w4a4_plugin.calibration.block.nearest import is_larger, relative_error
from vllm_w4a4_plugin.calibration.block.plan import BlockPlan
from vllm_w4a4_plugin.calibration.block.quantizer import BlockResult, quantize_block
from vllm_w4a4_plugin.calibration.devices import DevicePool
from vllm_w4a4_plugin.calibration.model.block import LoadedBlock
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.calibration.model.structure import Role
from vllm_w4a4_plugin.calibration.recipe import RECIPES
from vllm_w4a4_plugin.calibration.transforms.closed_form import Transform

PREFIX = "model.layers.0."


def quantized(directory: Path, ids: torch.Tensor, recipe: str = "all-w4a4", **plan: Any) -> BlockResult:
    model = StreamedModel(directory)
    hidden, _ = model.start(ids)
    whole = BlockPlan(RECIPES[recipe], **{"held_out": 2, **plan})
    devices = DevicePool([torch.device("cpu")])
    return quantize_block(partial(LoadedBlock, model, 0), hidden, whole, devices, Activations())


def fallbacks(result: BlockResult) -> dict[str, str]:
    return {report.name.rpartition(".")[2]: report.fallback for report in result.reports if report.fallback}


def test_a_group_made_worse_is_rounded_and_its_norm_is_as_before(
    float_model: Callable[..., Path], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = group.quantize_group

    def spoiled(block: LoadedBlock, this: Any, *rest: Any) -> Any:
        found = original(block, this, *rest)
        return replace(found, codes=found.codes.flip(0)) if this.role is Role.QKV else found

    monkeypatch.setattr(guard, "quantize_group", spoiled)
    directory = float_model("llama")
    result = quantized(directory, ids)
    assert fallbacks(result) == dict.fromkeys(["q_proj", "k_proj", "v_proj"], "rounded to nearest")
    source = StreamedModel(directory).weights
    norm = f"{PREFIX}input_layernorm.weight"
    assert torch.equal(result.tensors[norm], source.read(norm))
    other = f"{PREFIX}post_attention_layernorm.weight"
    assert not torch.equal(result.tensors[other], source.read(other))
    weight = source.read(f"{PREFIX}self_attn.q_proj.weight").float()
    scale = weight.abs().amax(1, keepdim=True) / 7
    name = f"{PREFIX}self_attn.q_proj."
    assert torch.allclose(result.tensors[f"{name}weight_scale"], scale)
    assert torch.equal(result.tensors[f"{name}weight"].float(), (weight / scale).round())
    assert torch.equal(result.tensors[f"{name}left_trans"], torch.eye(12))
    assert torch.equal(result.tensors[f"{name}right_trans"], torch.eye(8))
    assert result.tensors[f"{name}clip_ratio"].tolist() == [1.0]
    for report in result.reports[:3]:
        assert report.before == report.after


@pytest.mark.parametrize("recipe", ["all-w4a4", "w4a4-w8a8"])
def test_a_fold_that_makes_its_layer_worse_is_left_out(
    recipe: str, float_model: Callable[..., Path], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fold._channel_transform

    def extreme(*arguments: Any) -> Transform:
        found = original(*arguments)
        spread = torch.logspace(-3, 3, len(found.diagonal), dtype=torch.float64)
        return replace(found, diagonal=found.diagonal * spread)

    monkeypatch.setattr(fold, "_channel_transform", extreme)
    directory = float_model("llama")
    result = quantized(directory, ids, recipe)
    assert fallbacks(result) == {"down_proj": "not folded into mlp.up_proj"}
    up = [name for name in result.tensors if name.startswith(f"{PREFIX}mlp.up_proj.")]
    monkeypatch.undo()
    without = quantized(directory, ids, "tutorial")  # leaves down as it is, so that nothing is folded into up
    assert all(torch.equal(result.tensors[name], without.tensors[name]) for name in up) == (recipe == "w4a4-w8a8")


def test_a_block_made_worse_is_rounded_as_a_whole(
    float_model: Callable[..., Path], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No group by itself shows it here: what spoils the block happens to a layer that stays float."""
    original = quantizer.BlockQuantizer._fold

    def spoiling(self: Any) -> set[Role]:
        if not self.plan.plain:
            self.block.linear("mlp.down_proj").weight.mul_(3)
        return original(self)

    monkeypatch.setattr(quantizer.BlockQuantizer, "_fold", spoiling)
    directory = float_model("qwen3")
    result = quantized(directory, ids, "tutorial")
    assert fallbacks(result) == dict.fromkeys(
        ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "rounded to nearest"
    )
    source = StreamedModel(directory).weights
    for name in ("input_layernorm", "post_attention_layernorm", "mlp.down_proj"):
        assert torch.equal(result.tensors[f"{PREFIX}{name}.weight"], source.read(f"{PREFIX}{name}.weight"))
    assert result.hidden.shape == (*ids.shape, 96)


@pytest.mark.parametrize("recipe", ["tutorial", "all-w4a4"])
def test_held_out_rows_do_not_influence_the_result(
    recipe: str, float_model: Callable[..., Path], ids: torch.Tensor
) -> None:
    directory = float_model("llama")
    other = torch.cat([ids[:-2], ids[-2:].flip(1)])
    first, second = (quantized(directory, rows, recipe) for rows in (ids, other))
    assert fallbacks(first) == fallbacks(second) == {}
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    assert first.loss != second.loss


def test_without_held_out_rows_nothing_is_undone(
    float_model: Callable[..., Path], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "is_larger", lambda *_: True)
    assert fallbacks(quantized(float_model("llama"), ids, held_out=0)) == {}


def test_errors_count_each_token_by_itself() -> None:
    exact = torch.tensor([[3.0, 4.0], [3000.0, 4000.0], [0.0, 0.0]])
    found = exact + torch.tensor([[0.5, 0.0], [500.0, 0.0], [0.0, 0.0]])
    assert relative_error(found, exact) == pytest.approx((0.1 + 0.1 + 0) / 3)
    assert relative_error(torch.zeros(4, 2), torch.zeros(4, 2)) == 0
    assert is_larger(0.2, 0.1)
    assert is_larger(float("nan"), 0.1)
    assert not is_larger(0.1, 0.1)
