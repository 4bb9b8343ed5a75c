# SPDX-License-Identifier: Apache-2.0
"""Recipes: names, YAML files, patterns."""

from pathlib import Path

import pytest

from vllm_w4a4_plugin.calibration.errors import CalibrationError
from vllm_w4a4_plugin.calibration.model.structure import Group, Role
from vllm_w4a4_plugin.calibration.recipe import RECIPES, load_recipe
from vllm_w4a4_plugin.checkpoint import QuantType

GROUPS = {
    Role.QKV: Group(Role.QKV, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Role.O: Group(Role.O, ("self_attn.o_proj",)),
    Role.GATE_UP: Group(Role.GATE_UP, ("mlp.gate_proj", "mlp.up_proj")),
    Role.DOWN: Group(Role.DOWN, ("mlp.down_proj",)),
}


def test_keep_float_and_yaml(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text('base: all-w4a4\nlayers:\n  "*.down_proj": W8A8_DYNAMIC\n  "model.layers.1.mlp.down_proj": FLOAT\n')
    recipe = load_recipe(str(file), ["model.layers.0.self_attn.*"])
    first, second = (recipe.of_block(f"model.layers.{i}", GROUPS) for i in (0, 1))
    four, eight, kept = QuantType.W4A4_FLATQUANT_DYNAMIC, QuantType.W8A8_DYNAMIC, QuantType.FLOAT
    assert first == {Role.QKV: kept, Role.O: kept, Role.GATE_UP: four, Role.DOWN: eight}
    assert second == {Role.QKV: four, Role.O: four, Role.GATE_UP: four, Role.DOWN: kept}


def test_groups_must_stay_together() -> None:
    with pytest.raises(CalibrationError, match="one matrix product"):
        load_recipe("tutorial", ["*.q_proj"]).of_block("model.layers.0", GROUPS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("layers: [", "as YAML"),
        ("base: best", "unknown base"),
        ("layers: {'*': INT3}", "quant type must be one of"),
        ("layers: {'*': W4A4_DYNAMIC}", "quant type must be one of"),
        ("rules: {}", "keys base and layers"),
        ("base: [all-w4a4]", "unknown base"),
        ("layers: {'*': [FLOAT]}", "quant type must be one of"),
        ("layers: {'*': {a: FLOAT}}", "quant type must be one of"),
    ],
)
def test_bad_recipes(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load_recipe(str(tmp_path / "r.yaml"))


def expert_names(block: int = 0) -> list[str]:
    leaves = ("gate_proj", "up_proj", "down_proj")
    return [f"model.layers.{block}.mlp.experts.{number}.{leaf}" for number in range(3) for leaf in leaves]


def test_experts_have_one_type(tmp_path: Path) -> None:
    assert load_recipe("tutorial").of_experts(expert_names()) == QuantType.W4A4_FLATQUANT_DYNAMIC
    assert load_recipe("w4a8").of_experts(expert_names()) == QuantType.W8A8_DYNAMIC
    file = tmp_path / "r.yaml"
    file.write_text('layers:\n  "*.experts.*": W4A4_DYNAMIC\n  "model.layers.1.*": FLOAT\n')
    found = [load_recipe(str(file)).of_experts(expert_names(block)) for block in (0, 1)]
    assert found == [QuantType.W4A4_DYNAMIC, QuantType.FLOAT]
    file.write_text('layers:\n  "*.down_proj": W8A8_DYNAMIC\n')
    with pytest.raises(CalibrationError) as error:
        load_recipe(str(file)).of_experts(expert_names())
    assert "experts.0.down_proj: W8A8_DYNAMIC" in str(error.value)
    assert "'*.experts.*'" in str(error.value)
    file.write_text('layers:\n  "*.experts.*": W4A8_DYNAMIC\n')
    with pytest.raises(CalibrationError, match=r"experts of quant type W4A8_DYNAMIC cannot be run. Types that can: "):
        load_recipe(str(file)).of_experts(expert_names())


def test_unknown_names() -> None:
    with pytest.raises(CalibrationError, match=", ".join(RECIPES)):
        load_recipe("w3a3")
    with pytest.raises(CalibrationError, match="matches no linear layer"):
        load_recipe("tutorial", ["*.qproj"]).check_patterns(["model.layers.0.self_attn.q_proj"])
