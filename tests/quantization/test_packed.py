# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose int4 weights are packed on disk load into the same parameters, to the bit, as unpacked ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from tests.cases import write_case
from tests.conftest import MICRO
from tests.engine.packed_cases import write_packed
from tests.fuzz.answers import findings
from tests.loading import loaded_model
from tests.mixtures import write_mixture
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader


def parameters(directory: Path) -> dict[str, torch.Tensor]:
    with loaded_model(directory, dtype="float32") as model:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["micro", "f4_group3d", "n3_glm4", "mixture"])
def test_loaded_parameters(name: str, tmp_path: Path) -> None:
    """Fused shards, groups, a module that is fused on disk, experts."""
    source = tmp_path / "source"
    if name == "micro":
        source = MICRO
    elif name == "mixture":
        if "intermediate_size" not in FusedMoEConfig.__annotations__:
            pytest.skip("this vLLM's experts are not those that the plugin replaces")
        write_mixture(source, ("W4A4_FLATQUANT_DYNAMIC", "W4A4_DYNAMIC"), experts=2)
    else:
        write_case(name, source)
    write_packed(source, tmp_path / "packed")
    stored = CheckpointReader(tmp_path / "packed").tensors
    assert any(info.dtype == "U8" for info in stored.values())
    assert findings(tmp_path / "packed") == []
    before, after = parameters(source), parameters(tmp_path / "packed")
    assert before.keys() == after.keys()
    assert [name for name in before if not before[name].equal(after[name])] == []


def test_half_of_an_unpacked_weight_is_not_taken_for_a_packed_one(
    micro_copy: Path, edit_tensors: Callable[..., None]
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = CheckpointReader(MICRO).load(name)
    edit_tensors({name: weight[: len(weight) // 2].contiguous()})
    assert name in findings(micro_copy)[0]
    edit_tensors({name: weight.view(torch.uint8)})  # packed, but of twice as many rows
    assert "q_proj.weight: expected shape [256, 192] (config.json), found [512, 192]" in findings(micro_copy)[0]
    with pytest.raises(CheckpointError, match="q_proj"), loaded_model(micro_copy):
        pass


def test_a_packed_weight_of_another_type_is_refused(micro_copy: Path, edit_tensors: Callable[..., None]) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    edit_tensors({name: CheckpointReader(MICRO).load(name).view(torch.uint8)})
    assert "expected dtype I8 for W8A8_DYNAMIC, found U8" in findings(micro_copy)[0]


def test_reloading_in_place(tmp_path: Path) -> None:
    """A trainer may bring packed weights to a model that was loaded from unpacked ones."""
    write_packed(MICRO, tmp_path / "packed")
    reader = CheckpointReader(tmp_path / "packed")
    with loaded_model(MICRO, dtype="float32") as model:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.int8:
                parameter.data.zero_()
            assert name
        model.load_weights((name, reader.load(name)) for name in reader.tensors)
        changed = [name for name, parameter in model.named_parameters() if not parameter.equal(before[name])]
    assert changed == []
