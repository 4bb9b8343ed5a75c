# SPDX-License-Identifier: Apache-2.0
"""What can be run where, and the text for what cannot."""

import pytest

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.runnable import ON_CPU, ON_NPU, Kind, kind_of, types_for, unsupported_reason
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.checkpoint.types import known_types

FILE = "quant_model_description.json"


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", Kind.LINEAR),
        ("model.layers.0.mlp.gate", Kind.ROUTER),
        ("model.layers.0.mlp.experts.3.up_proj", Kind.EXPERTS),
        ("model.layers.0.mlp.shared_experts.up_proj", Kind.LINEAR),
        ("lm_head", Kind.HEAD),
        ("language_model.lm_head", Kind.HEAD),
        ("model.embed_tokens", Kind.EMBEDDING),
        ("transformer.wte", Kind.EMBEDDING),
        ("model.layers.0.self_attn.kv_b_proj", Kind.LATENT),
        ("model.visual.blocks.0.attn.qkv", Kind.VISION),
        ("visual.merger.mlp.0", Kind.VISION),
        ("vision_tower.encoder.layers.0.self_attn.q_proj", Kind.VISION),
        ("model.layers.0.visual_gate_proj", Kind.LINEAR),
        ("model.visual.pos_embed", Kind.EMBEDDING),
    ],
)
def test_kind_of(module: str, kind: Kind) -> None:
    assert kind_of(module) is kind


@pytest.mark.parametrize("kind", Kind)
def test_everything_runs_in_float(kind: Kind) -> None:
    assert QuantType.FLOAT in types_for(kind, ON_CPU)
    assert QuantType.FLOAT in types_for(kind, ON_NPU)


@pytest.mark.parametrize("quant_type", [t for t in known_types() if t is not QuantType.FLOAT])
@pytest.mark.parametrize(
    "kind", [kind for kind in Kind if kind not in (Kind.LINEAR, Kind.EXPERTS, Kind.VISION, Kind.HEAD)]
)
def test_on_cpus_these_stay_float(kind: Kind, quant_type: QuantType) -> None:
    reason = unsupported_reason("x", quant_type, kind)
    expected = f"{FILE}: layer x: {kind} of quant type {quant_type} cannot be run here. Types that can: FLOAT."
    assert reason.startswith(expected)


@pytest.mark.parametrize("quant_type", [t for t in known_types() if t is not QuantType.FLOAT])
def test_output_heads(quant_type: QuantType) -> None:
    reason = unsupported_reason("x", quant_type, Kind.HEAD)
    assert (reason == "") == (quant_type == "W8A8_DYNAMIC")
    assert not reason or "output heads of quant type" in reason
    assert not reason or "Types that can: FLOAT, W8A8_DYNAMIC." in reason
    on_npus = unsupported_reason("x", quant_type, Kind.HEAD, backends=ON_NPU)
    assert (on_npus == "") == ("vllm-ascend" in quant_type.spec.runs_on)


def test_experts_on_cpu() -> None:
    for quant_type in ("W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC", "W8A8_DYNAMIC"):
        assert unsupported_reason("x", QuantType(quant_type), Kind.EXPERTS) == ""
    assert unsupported_reason("x", QuantType.W8A8, Kind.EXPERTS).startswith(
        f"{FILE}: layer x: experts of quant type W8A8 cannot be run here. Types that can: FLOAT, W8A8_DYNAMIC, "
        "W4A4_DYNAMIC, W4A4_FLATQUANT_DYNAMIC. "
    )


@pytest.mark.parametrize("backends", [ON_CPU, ON_NPU], ids=["CPUs", "NPUs"])
def test_vision_parts_have_no_4_bit_activations(backends: frozenset[str]) -> None:
    types = types_for(Kind.VISION, backends)
    assert {t for t in types_for(Kind.LINEAR, backends) if "A4" not in t} == set(types)
    for quant_type in (QuantType.W4A4_DYNAMIC, QuantType.W4A4_FLATQUANT_DYNAMIC):
        reason = unsupported_reason("visual.merger", quant_type, Kind.VISION, backends=backends)
        assert f"layer visual.merger: vision parts of quant type {quant_type} cannot be run" in reason
        assert "Types that can: FLOAT, W8A8_DYNAMIC, W8A8, " in reason


def test_a_type_that_no_file_has() -> None:
    reason = unsupported_reason("x", QuantType.W4A4_DYNAMIC, Kind.ROUTER, backends=ON_NPU, file="")
    assert reason.startswith("layer x: routers of experts of quant type W4A4_DYNAMIC cannot be run on NPUs.")


def test_linear_layers() -> None:
    assert unsupported_reason("x", QuantType.W4A4_FLATQUANT_DYNAMIC, Kind.LINEAR) == ""
    mixed = QuantType("W8A8_MIX")
    reason = unsupported_reason("x", mixed, Kind.LINEAR)
    assert "quant type W8A8_MIX cannot be run here. Types that can: FLOAT, W8A8_DYNAMIC, W4A4_DYNAMIC" in reason
    assert "vllm-ascend runs it on NPUs." in reason
    assert unsupported_reason("x", mixed, Kind.LINEAR, backends=ON_NPU) == ""


@pytest.mark.parametrize(("name", "on_npus"), [("W4A4_MXFP4", True), ("W4A8_SVD_DYNAMIC", False)])
def test_what_runs_nowhere_is_not_sent_to_npus(name: str, on_npus: bool) -> None:
    reason = unsupported_reason("x", QuantType(name), Kind.LINEAR)
    assert f"quant type {name} cannot be run here. Types that can: FLOAT" in reason
    assert ("vllm-ascend runs it on NPUs." in reason) == on_npus


def test_experts_on_npus() -> None:
    for quant_type in ("W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC", "W8A8_DYNAMIC"):
        assert unsupported_reason("x", QuantType(quant_type), Kind.EXPERTS, backends=ON_NPU) == ""
    reason = unsupported_reason("x", QuantType.W8A8_FLATQUANT_DYNAMIC, Kind.EXPERTS, backends=ON_NPU)
    assert "experts of quant type W8A8_FLATQUANT_DYNAMIC cannot be run on NPUs" in reason
    assert "W4A8_DYNAMIC" in reason


@pytest.mark.parametrize(("groups", "fits"), [(1, True), (12, True), (24, True), (48, False), (96, False)])
def test_groups_that_the_cpu_kernels_take(groups: int, fits: bool) -> None:
    spec = LinearSpec("x", QuantType.W4A4_DYNAMIC, 64, 192, groups)
    reason = unsupported_reason("x", QuantType.W4A4_DYNAMIC, Kind.LINEAR, spec)
    assert (reason == "") == fits
    assert fits or f"group size {192 // groups} is not a multiple of 8" in reason
