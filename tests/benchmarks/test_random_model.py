# SPDX-License-Identifier: Apache-2.0
"""The random models of the end-to-end benchmark are checkpoints like any other."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks import random_model
from benchmarks.shapes import Experts, Model
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.experts import plan_experts
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.verify import check_headers

SMALL = Model("small", hidden=192, intermediate=512, heads=4, kv_heads=2, head_dim=64)
MIXTURE = replace(SMALL, intermediate=96, experts=Experts("small", count=5, top_k=2, hidden=192, intermediate=96))


@pytest.mark.parametrize(("recipe", "w4a4", "w8a8"), [("tutorial", 5, 1), ("all-w4a4", 7, 0)])
def test_quantized_models_are_valid(tmp_path: Path, recipe: str, w4a4: int, w8a8: int) -> None:
    random_model.make(tmp_path / "model", SMALL, 2, recipe)
    reader = CheckpointReader(tmp_path / "model")
    check_headers(reader)
    types = [kind for name, kind in reader.description.tensors.items() if name.endswith("_proj.weight")]
    assert types.count(QuantType.W4A4_FLATQUANT_DYNAMIC) == 2 * w4a4
    assert types.count(QuantType.W8A8_DYNAMIC) == 2 * w8a8


def test_bytes_of_a_step_are_those_of_the_files(tmp_path: Path) -> None:
    random_model.make(tmp_path / "model", SMALL, 2, "float")
    stored = 0
    for shard in (tmp_path / "model").glob("*.safetensors"):
        with safe_open(shard, framework="pt") as opened:
            tensors = [opened.get_tensor(name) for name in opened.keys() if "norm" not in name]  # noqa: SIM118
        stored += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert random_model.step_bytes(SMALL, 2, "float", 2) == stored


def test_quantized_mixtures_are_valid(tmp_path: Path) -> None:
    random_model.make(tmp_path / "model", MIXTURE, 2, "all-w4a4")
    reader = CheckpointReader(tmp_path / "model")
    check_headers(reader)
    inventory = Inventory(reader.description, reader.tensors, config=reader.config)
    for layer in range(2):
        plan = plan_experts(f"model.layers.{layer}.mlp.experts", inventory)
        assert (plan.count, plan.quant_type) == (5, QuantType.W4A4_FLATQUANT_DYNAMIC)
    types = reader.description.tensors
    assert types["model.layers.1.mlp.gate.weight"] == QuantType.FLOAT


def test_a_step_reads_the_experts_that_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of 5 experts a token chooses 2; the router is read as a whole.
    attention = (4 * 64 + 2 * 2 * 64) * 192 + 192 * 4 * 64
    expert, router, head = 3 * 192 * 96, 5 * 192, 151936 * 192
    assert random_model.step_bytes(MIXTURE, 3, "float", 2) == 2 * (3 * (attention + 2 * expert + router) + head)
    int4 = 3 * ((attention + 2 * expert) // 2 + 2 * router)
    for kind, head_bytes in (("float", 2 * head), ("int8", head), ("int4", head // 2)):
        monkeypatch.setenv("VLLM_W4A4_HEAD", kind)
        assert random_model.step_bytes(MIXTURE, 3, "all-w4a4", 2) == int4 + head_bytes


def test_recipes_for_experts_have_one_type_for_them() -> None:
    assert {recipe: random_model.splits_experts(recipe) for recipe in (*random_model.RECIPES, random_model.GPTQ)} == {
        "float": False,
        "tutorial": True,
        "all-w4a4": False,
        "gptq": False,
    }
