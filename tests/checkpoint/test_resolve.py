# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import MICRO, PACKED
from vllm_w4a4_plugin.checkpoint import CheckpointError, QuantDescription, QuantType, load_description, resolve
from vllm_w4a4_plugin.checkpoint.resolve import resolve_experts, shard_names, spellings
from vllm_w4a4_plugin.checkpoint.types import known_types

W4A4, W8A8, FLOAT = QuantType.W4A4_FLATQUANT_DYNAMIC, QuantType.W8A8_DYNAMIC, QuantType.FLOAT


def describe(**modules: QuantType) -> QuantDescription:
    names = {f"{name.replace('__', '.')}.weight": kind.value for name, kind in modules.items()}
    return QuantDescription(tensors=names)


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("model.layers.0.self_attn.qkv_proj", W4A4),
        ("model.layers.0.self_attn.o_proj", W8A8),
        ("model.layers.1.mlp.gate_up_proj", W4A4),
        ("model.layers.1.mlp.down_proj", FLOAT),
        ("lm_head", FLOAT),
    ],
)
def test_every_linear_of_the_real_checkpoint(prefix: str, expected: QuantType) -> None:
    assert resolve(load_description(MICRO), prefix, PACKED) is expected


def test_names_match_as_whole_components() -> None:
    description = describe(mlp__gate_proj=W4A4, mlp__up_proj=W4A4, mlp__gate=FLOAT)
    assert resolve(description, "mlp.gate", PACKED) is FLOAT
    assert resolve(description, "mlp.gate_up_proj", PACKED) is W4A4


def test_layer_1_is_not_layer_10() -> None:
    description = describe(model__layers__1__mlp__down_proj=W4A4, model__layers__10__mlp__down_proj=FLOAT)
    assert resolve(description, "model.layers.10.mlp.down_proj", PACKED) is FLOAT
    assert resolve(description, "model.layers.1.mlp.down_proj", PACKED) is W4A4


def test_mixed_shards_are_an_error_that_names_each() -> None:
    description = describe(attn__q_proj=W4A4, attn__k_proj=W8A8, attn__v_proj=W4A4)
    with pytest.raises(CheckpointError) as caught:
        resolve(description, "attn.qkv_proj", PACKED)
    for part in ("attn.q_proj: W4A4_FLATQUANT_DYNAMIC", "attn.k_proj: W8A8_DYNAMIC", "attn.v_proj", "attn.qkv_proj"):
        assert part in str(caught.value)


def test_a_missing_layer_lists_the_nearest_names() -> None:
    description = describe(model__layers__0__mlp__down_proj=FLOAT, visual__merger=FLOAT)
    with pytest.raises(CheckpointError) as caught:
        resolve(description, "model.layers.0.mlp.dwn_proj", PACKED)
    assert "model.layers.0.mlp.down_proj" in str(caught.value)
    assert "'model.layers.0.mlp.dwn_proj.weight'" in str(caught.value)


def test_a_missing_shard_is_missing_even_if_others_are_there() -> None:
    with pytest.raises(CheckpointError, match=r"attn\.v_proj"):
        resolve(describe(attn__q_proj=W4A4, attn__k_proj=W4A4), "attn.qkv_proj", PACKED)


def test_an_unknown_type_is_refused_with_the_known_ones() -> None:
    description = QuantDescription(tensors={"mlp.down_proj.weight": "W3A3"})
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight.*'W3A3'.*W4A4_FLATQUANT_DYNAMIC"):
        resolve(description, "mlp.down_proj", PACKED)


def test_a_tied_head_needs_no_entry() -> None:
    assert resolve(describe(mlp__down_proj=W4A4), "lm_head", PACKED) is FLOAT
    assert resolve(describe(mlp__down_proj=W4A4), "language_model.lm_head", PACKED) is FLOAT


@pytest.mark.parametrize(
    ("described", "prefix"),
    [
        ("model.layers.0.mlp.down_proj", "language_model.model.layers.0.mlp.down_proj"),
        ("model.language_model.layers.0.mlp.down_proj", "language_model.model.layers.0.mlp.down_proj"),
        ("language_model.model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),
        ("language_model.model.layers.0.mlp.down_proj", "model.language_model.layers.0.mlp.down_proj"),
    ],
)
def test_wrapped_models(described: str, prefix: str) -> None:
    assert resolve(QuantDescription(tensors={f"{described}.weight": W4A4.value}), prefix, PACKED) is W4A4


def test_an_exact_name_wins_over_a_wrapped_one() -> None:
    description = QuantDescription(tensors={"model.a.weight": "FLOAT", "language_model.model.a.weight": W8A8.value})
    assert resolve(description, "model.a", {}) is FLOAT
    assert resolve(description, "language_model.model.a", {}) is W8A8


def test_every_expert_counts() -> None:
    names = [f"mlp.experts.{e}.{p}.weight" for e in range(3) for p in ("gate_proj", "up_proj", "down_proj")]
    same = QuantDescription(tensors=dict.fromkeys(names, W8A8.value))
    assert resolve_experts(same, "mlp.experts") is W8A8
    mixed = QuantDescription(tensors={**same.tensors, "mlp.experts.2.up_proj.weight": FLOAT.value})
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.2\.up_proj: FLOAT"):
        resolve_experts(mixed, "mlp.experts")
    with pytest.raises(CheckpointError, match="no entry"):
        resolve_experts(mixed, "other.experts")


component = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
names = st.lists(component, min_size=1, max_size=5).map(".".join)


@given(names, st.lists(component, min_size=1, max_size=4, unique=True))
def test_shards_replace_only_the_last_component(parent: str, leaves: list[str]) -> None:
    other = QuantDescription(tensors={"other.weight": "FLOAT"})
    assert shard_names(other, f"{parent}.fused", {"fused": leaves}) == [f"{parent}.{leaf}" for leaf in leaves]
    assert shard_names(other, f"fused.{parent}x", {"fused": leaves}) == [f"fused.{parent}x"]
    whole = QuantDescription(tensors={f"{parent}.fused.weight": "FLOAT"})
    assert shard_names(whole, f"{parent}.fused", {"fused": leaves}) == [f"{parent}.fused"]


@given(names)
def test_a_name_is_its_own_first_spelling_and_spellings_differ(name: str) -> None:
    found = list(spellings(name))
    assert found[0] == name
    assert found.count(name) == 1


@given(st.dictionaries(names, st.sampled_from(known_types()), min_size=1, max_size=6))
def test_every_described_module_resolves_to_its_type(modules: dict[str, QuantType]) -> None:
    description = QuantDescription(tensors={f"{name}.weight": kind.value for name, kind in modules.items()})
    for name, kind in modules.items():
        assert resolve(description, name, {}) is kind
