# SPDX-License-Identifier: Apache-2.0
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import MICRO, WEIGHTS
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader, QuantDescription, QuantType, TensorInfo
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.layers import linear_modules
from vllm_w4a4_plugin.checkpoint.plan import plan_layer
from vllm_w4a4_plugin.checkpoint.resolve import USUALLY_FUSED, resolve_experts

BLOCK = "model.layers.0"
EXPERTS, HIDDEN, WIDTH = 128, 4096, 1536


def test_a_fused_layer_of_the_real_checkpoint() -> None:
    plan = plan_layer(f"{BLOCK}.self_attn.qkv_proj", Inventory.of(CheckpointReader(MICRO)), USUALLY_FUSED)
    assert plan.quant_type is QuantType.W4A4_FLATQUANT_DYNAMIC
    assert plan.shards == tuple(f"{BLOCK}.self_attn.{name}_proj" for name in "qkv")
    assert plan.spec is not None
    assert (plan.spec.input_size, plan.spec.left, plan.spec.right) == (192, 12, 16)
    assert plan.weight_bytes == (256 + 2 * 128) * 192
    suffixes = ("weight", "weight_scale", "weight_offset", "left_trans", "right_trans", "clip_ratio")
    assert plan.files == {f"{shard}.{suffix}": WEIGHTS for shard in plan.shards for suffix in suffixes}


def test_errors_carry_the_names_of_the_files() -> None:
    """vLLM spells a wrapped model's names differently; messages name what is in the files."""
    inventory = Inventory.of(CheckpointReader(MICRO)).renamed(lambda names: {f"lm.{k}": v for k, v in names.items()})
    plan = plan_layer(f"lm.{BLOCK}.self_attn.qkv_proj", inventory, USUALLY_FUSED)
    text = str(plan.error("weight", 1, "expected this, found that"))
    assert text.startswith(f"{WEIGHTS}: layer lm.{BLOCK}.self_attn.qkv_proj, tensor {BLOCK}.self_attn.k_proj.weight: ")


def test_sizes_are_assumed_where_there_are_no_weights() -> None:
    inventory = Inventory(CheckpointReader(MICRO).description)
    name = f"{BLOCK}.self_attn.q_proj"
    found = plan_layer(name, inventory, {}, sizes=(192, 256))
    read = plan_layer(name, Inventory.of(CheckpointReader(MICRO)), {})
    assert found.spec == read.spec
    assert found.files == {}
    assert plan_layer(name, inventory, {}).spec is None


def test_a_tied_head_has_a_plan_without_dimensions() -> None:
    plan = plan_layer("lm_head", Inventory(QuantDescription(tensors={"a.weight": "FLOAT"})), {})
    assert (plan.quant_type, plan.spec, plan.weight_bytes) == (QuantType.FLOAT, None, 0)


names = st.lists(st.sampled_from(["a", "b", "gate", "gate_proj", "mlp", "mlp2"]), min_size=1, max_size=3).map(".".join)


@given(st.dictionaries(names, st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6))
def test_a_plan_has_its_own_modules_tensors_and_no_others(sizes: dict[str, tuple[int, int]]) -> None:
    described, headers = {}, {}
    for number, (module, (rows, columns)) in enumerate(sizes.items()):
        for suffix, dtype, shape in (("weight", "I8", (rows, columns)), ("weight_scale", "F32", (rows, 1))):
            described[f"{module}.{suffix}"] = "W4A4_DYNAMIC"
            headers[f"{module}.{suffix}"] = TensorInfo(f"{module}.{suffix}", f"file{number}", dtype, shape)
    inventory = Inventory(QuantDescription(tensors=described), headers)
    for number, (module, (rows, columns)) in enumerate(sizes.items()):
        plan = plan_layer(module, inventory, {})
        assert plan.spec is not None
        assert (plan.spec.output_size, plan.spec.input_size, plan.weight_bytes) == (rows, columns, rows * columns)
        assert plan.files == dict.fromkeys((f"{module}.weight", f"{module}.weight_scale"), f"file{number}")
    absent = "mlp.gate_pro"
    with pytest.raises(CheckpointError, match="has no entry"):
        plan_layer(absent, inventory, {})


def mixture_of_experts(layers: int) -> Inventory:
    """Names and headers of a model with 128 experts in each layer, all W4A4_DYNAMIC but the routers."""
    described, headers = {}, {}

    def add(module: str, output_size: int, input_size: int, kind: str = "W4A4_DYNAMIC") -> None:
        shapes = {
            "weight": (output_size, input_size),
            "weight_scale": (output_size, 1),
            "weight_offset": (output_size, 1),
        }
        for suffix, shape in shapes.items() if kind != "FLOAT" else [("weight", shapes["weight"])]:
            name = f"{module}.{suffix}"
            dtype = "BF16" if kind == "FLOAT" else "I8" if suffix == "weight" else "F32"
            described[name], headers[name] = kind, TensorInfo(name, "model.safetensors", dtype, shape)

    for layer in range(layers):
        for name, output_size in (("q", HIDDEN), ("k", 512), ("v", 512), ("o", HIDDEN)):
            add(f"model.layers.{layer}.self_attn.{name}_proj", output_size, HIDDEN)
        add(f"model.layers.{layer}.mlp.gate", EXPERTS, HIDDEN, "FLOAT")
        for expert in range(EXPERTS):
            for name in ("gate", "up"):
                add(f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj", WIDTH, HIDDEN)
            add(f"model.layers.{layer}.mlp.experts.{expert}.down_proj", HIDDEN, WIDTH)
    return Inventory(QuantDescription(tensors=described), headers)


def seconds_of_planning(layers: int) -> float:
    """CPU time of planning such a model twice: with a wrapped model's names, and with those of the files."""
    inventory = mixture_of_experts(layers)
    started = time.process_time()
    renamed = inventory.renamed(lambda names: {f"language_model.{name}": value for name, value in names.items()})
    for layer in range(layers):
        block = f"language_model.model.layers.{layer}"
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate"):
            plan_layer(f"{block}.{name}", renamed, USUALLY_FUSED)
        assert resolve_experts(renamed.description, f"{block}.mlp.experts") is QuantType.W4A4_DYNAMIC
    modules = linear_modules(inventory)
    assert len(modules) == layers * (5 + 3 * EXPERTS)
    for name in modules:
        plan_layer(name, inventory, {})
    return time.process_time() - started


def test_planning_a_large_mixture_of_experts_is_linear() -> None:
    """A quadratic step would take 64 times as long for 8 times the layers; other work on the machine slows both."""
    assert seconds_of_planning(96) < 24 * seconds_of_planning(12)


@pytest.mark.parametrize("stored", ["model.mtp_layers.0", "model.mtp_block.0"])
def test_mtp_layers_are_numbered_as_in_vllm(stored: str) -> None:
    """After the last layer, if config.json counts one; MiMo's and Ernie's files begin at 0 again."""
    description = QuantDescription(
        tensors={"model.layers.1.o_proj.weight": "FLOAT", f"{stored}.o_proj.weight": "FLOAT"}
    )
    counted = Inventory(description, config={"num_hidden_layers": 2, "num_nextn_predict_layers": 1})
    found = counted.with_numbered_mtp_layers()
    assert list(found.description.modules) == ["model.layers.1.o_proj", "model.layers.2.o_proj"]
    assert found.stored_name("model.layers.2.o_proj") == f"{stored}.o_proj"
    for config in ({"num_hidden_layers": 2}, {}):
        other = Inventory(description, config=config).with_numbered_mtp_layers()
        assert list(other.description.modules) == ["model.layers.1.o_proj", f"{stored}.o_proj"]
