# SPDX-License-Identifier: Apache-2.0
"""Models with layers of all types: which layer is whose."""

import sys
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from tests.conftest import PACKED
from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.quantization.ascend_config import AscendModelSlimConfig, AscendW4A4ModelSlimConfig

TYPES = {
    "self_attn.q_proj": "W4A4_FLATQUANT_DYNAMIC",
    "self_attn.k_proj": "W4A4_FLATQUANT_DYNAMIC",
    "self_attn.v_proj": "W4A4_FLATQUANT_DYNAMIC",
    "self_attn.o_proj": "W8A8_DYNAMIC",
    "self_attn.a_proj": "W8A8",
    "self_attn.b_proj": "W8A16",
    "mlp.gate_proj": "W4A4_DYNAMIC",
    "mlp.up_proj": "W4A4_DYNAMIC",
    "mlp.down_proj": "FLOAT",
    "mlp.gate": "FLOAT",
    "eh_proj": "W8A8_DYNAMIC",  # MTP
    "mlp.experts.0.gate_proj": "W8A8_DYNAMIC",
    "mlp.experts.0.up_proj": "W8A8_DYNAMIC",
    "mlp.experts.0.down_proj": "W8A8_DYNAMIC",
}
OURS = {"self_attn.qkv_proj", "mlp.gate_up_proj"}
EXPERTS = getattr(fused_moe, "FusedMoE", None) or fused_moe.RoutedExperts
"""vLLM's class for the experts' weights; the newer one has the second name."""
LINEARS = (*OURS, "self_attn.o_proj", "self_attn.a_proj", "self_attn.b_proj", "mlp.down_proj", "eh_proj")


@pytest.fixture(scope="module")
def mixed(config: VllmConfig) -> tuple[AscendW4A4ModelSlimConfig, AscendModelSlimConfig]:
    """Configurations of a model with all kinds of layers: ours and vllm-ascend's."""
    description: dict[str, Any] = {
        "version": "1.0.0",
        "kv_cache_type": "C8",
        "model.embed_tokens.weight": "W8A8_DYNAMIC",
        "lm_head.weight": "FLOAT",
        "model.layers.0.self_attn.k_proj.kv_cache_scale": "FLOAT",
    }
    for name, kind in TYPES.items():
        suffixes = ["weight"] if kind == "FLOAT" else ["weight", "weight_scale", "weight_offset"]
        if "FLATQUANT" in kind:
            suffixes += ["left_trans", "right_trans", "clip_ratio"]
        description |= {f"model.layers.0.{name}.{suffix}": kind for suffix in suffixes}
    configs = AscendW4A4ModelSlimConfig(dict(description)), AscendModelSlimConfig(dict(description))
    for quant_config in configs:
        quant_config.packed_modules_mapping = {**PACKED, "experts": ["experts.0.gate_proj", "experts.0.up_proj"]}
    return configs


def linear(**sizes: int) -> Any:
    layer = MagicMock(spec=LinearBase)
    layer.input_size, layer.output_size, layer.params_dtype = 192, 256, torch.bfloat16
    return layer


def classes(method: Any) -> list[str]:
    """The class of a method and of its scheme."""
    return [type(method).__qualname__, type(getattr(method, "quant_method", None)).__qualname__]


@pytest.mark.parametrize("name", LINEARS)
def test_linear_layers_of_a_mixed_model(config: VllmConfig, mixed: Any, name: str) -> None:
    ours, theirs = (c.get_quant_method(linear(), f"model.layers.0.{name}") for c in mixed)
    if name in OURS:
        assert classes(ours) == ["AscendW4A4NpuLinearMethod", "W4A4NpuScheme"]
    else:
        assert classes(ours) == classes(theirs)
        assert "W4A4" not in " ".join(classes(ours))


@pytest.mark.parametrize(
    ("kind", "name", "scheme"),
    [
        (VocabParallelEmbedding, "model.embed_tokens", "AscendW8A8DynamicLinearMethod"),
        (VocabParallelEmbedding, "lm_head", "NoneType"),
        (AttentionLayerBase, "model.layers.0.self_attn.attn", "AscendC8KVCacheAttentionMethod"),
    ],
)
def test_other_layers_of_a_mixed_model(config: VllmConfig, mixed: Any, kind: type, name: str, scheme: str) -> None:
    ours, theirs = (c.get_quant_method(MagicMock(spec=kind), name) for c in mixed)
    assert classes(ours) == classes(theirs)
    assert classes(ours)[1] == scheme


def test_experts_of_a_mixed_model(config: VllmConfig, mixed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheme of experts asks for communication groups when it is made, so only the request for it is compared."""
    asked: list[Any] = []

    def create(_what: Any, *others: Any) -> Any:
        asked.append(others)
        raise InterruptedError

    monkeypatch.setattr(sys.modules[AscendModelSlimConfig.__module__], "create_scheme_for_layer", create)
    for quant_config in mixed:
        with pytest.raises(InterruptedError):
            quant_config.get_quant_method(MagicMock(spec=EXPERTS), "model.layers.0.mlp.experts")
    assert asked[0] == asked[1]
    assert asked[0][1] == "moe"


def test_the_configuration_is_still_vllm_ascends(mixed: Any) -> None:
    ours, theirs = mixed
    assert isinstance(ours, AscendModelSlimConfig)
    assert ours.quant_description == theirs.quant_description
    for name in {"get_cache_scale", "is_c8_quant_layer"} & set(dir(theirs)):
        argument = "model.layers.0.self_attn.k_proj.kv_cache_scale"
        assert getattr(ours, name)(argument) == getattr(theirs, name)(argument)
    assert ours.enable_c8_quant


def test_shards_of_different_types_are_refused(config: VllmConfig) -> None:
    description = {f"model.layers.0.self_attn.{p}_proj.weight": "W4A4_DYNAMIC" for p in "qk"}
    ours = AscendW4A4ModelSlimConfig({**description, "model.layers.0.self_attn.v_proj.weight": "FLOAT"})
    ours.packed_modules_mapping = PACKED
    with pytest.raises(CheckpointError, match="must have one quant type"):
        ours.get_quant_method(linear(), "model.layers.0.self_attn.qkv_proj")


@pytest.mark.parametrize(
    ("name", "what"),
    [("model.layers.0.mlp.gate", "routers of experts"), ("visual.blocks.0.mlp.down_proj", "vision parts")],
)
def test_routers_and_vision_parts_in_w4a4_are_refused(config: VllmConfig, name: str, what: str) -> None:
    """As `doctor` refuses them."""
    ours = AscendW4A4ModelSlimConfig({f"{name}.{suffix}": "W4A4_DYNAMIC" for suffix in ("weight", "weight_scale")})
    with pytest.raises(CheckpointError, match=f"layer {name}: {what} of quant type W4A4_DYNAMIC cannot be run on NPUs"):
        ours.get_quant_method(linear(), name)


def test_a_w4a4_layer_that_only_vllm_ascend_finds_is_not_silent(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Were its name resolution ahead of ours, its own scheme would run; that is said and shown in the table."""
    ours = AscendW4A4ModelSlimConfig({"model.layers.0.mlp.up_proj.weight": "W4A4_DYNAMIC"})
    monkeypatch.setattr(AscendW4A4ModelSlimConfig, "_has_shard_of_ours", lambda self, prefix: False)
    method = ours.get_quant_method(linear(), "model.layers.0.mlp.up_proj")
    assert classes(method)[1] == "AscendW4A4LaosDynamicLinearMethod"
    assert "the plugin did not find it in the description" in ours.report.table()
    assert "It runs in vllm-ascend's own AscendW4A4LaosDynamicLinearMethod" in caplog.text


def test_a_w4a4_output_head_stays_with_vllm_ascend_and_is_named(config: VllmConfig) -> None:
    ours = AscendW4A4ModelSlimConfig({"lm_head.weight": "W4A4_DYNAMIC"})
    method = ours.get_quant_method(MagicMock(spec=VocabParallelEmbedding), "lm_head")
    assert classes(method) == ["AscendEmbeddingMethod", "AscendW4A4LaosDynamicLinearMethod"]
    assert "lm_head: not a linear layer" in ours.report.table()


def test_quantized_attention_is_vllm_ascends(config: VllmConfig) -> None:
    description = {"fa_quant_type": "FAKQuant", "model.layers.0.self_attn.fa_k.scale": "FAKQuant"}
    made = []
    for kind in (AscendW4A4ModelSlimConfig, AscendModelSlimConfig):
        method = kind(dict(description)).get_quant_method(
            MagicMock(spec=AttentionLayerBase), "model.layers.0.self_attn.attn"
        )
        made.append(classes(method))
    assert made[0] == made[1] == ["AscendKVCacheMethod", "AscendFAQuantAttentionMethod"]
