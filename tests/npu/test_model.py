# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of the real tool through vLLM's real loader, and mixed models: which layer is whose."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import FusedMoE
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model, get_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm_w4a4_plugin.npu_limits import KRONECKER
from vllm_w4a4_plugin.quantization.ascend import AscendModelSlimConfig, AscendW4A4ModelSlimConfig

from tests.npu.linears import PACKED, inputs, relative_error
from tests.npu.loading import distributed, engine_config, run_operators_on_cpu
from tests.npu.processes import MICRO
from vllm_w4a4_plugin.capacity.devices import find_device
from vllm_w4a4_plugin.capacity.memory import Serving, plan_memory
from vllm_w4a4_plugin.capacity.model import read_model
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.ops import reference

SAME_ROUNDINGS = 8e-3
W4A4_LAYERS = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def config() -> Iterator[VllmConfig]:
    config = engine_config(MICRO)
    with distributed(config):
        run_operators_on_cpu()
        yield config


@pytest.fixture(scope="module")
def model(config: VllmConfig) -> torch.nn.Module:
    return get_model(vllm_config=config)


def expected_output(reader: CheckpointReader, layer: str, x: torch.Tensor) -> torch.Tensor:
    """What the two NPU operators compute for a fused layer of the checkpoint, by the reference."""
    parent, _, leaf = layer.rpartition(".")
    outputs = []
    for shard in W4A4_LAYERS[f"{parent.rpartition('.')[2]}.{leaf}"]:
        t = {
            name: reader.load(f"{parent}.{shard}.{name}")
            for name in ("weight", "weight_scale", "left_trans", "right_trans", "clip_ratio")
        }
        outputs.append(
            reference.flatquant_linear_npu(
                x, t["weight"], t["weight_scale"].squeeze(1), t["left_trans"], t["right_trans"], t["clip_ratio"].item()
            )
        )
    return torch.cat(outputs, -1)


def assert_layers_compute(model: torch.nn.Module, directory: Path) -> None:
    reader = CheckpointReader(directory)
    for number in range(2):
        for suffix in W4A4_LAYERS:
            name = f"model.layers.{number}.{suffix}"
            x = inputs(192)
            found = model.get_submodule(name)(x)[0]
            assert relative_error(found, expected_output(reader, name, x)) < SAME_ROUNDINGS, name


def test_layers_get_the_right_classes(model: torch.nn.Module) -> None:
    found = {
        name: (type(layer).__name__, type(method).__name__, type(getattr(method, "quant_method", None)).__name__)
        for name, layer in model.named_modules()
        if (method := getattr(layer, "quant_method", None)) and name.startswith(("model.layers.1.", "lm_head"))
    }
    assert found == {
        "model.layers.1.self_attn.qkv_proj": (
            "AscendQKVParallelLinear",
            "AscendW4A4NpuLinearMethod",
            "W4A4NpuScheme",
        ),
        "model.layers.1.self_attn.o_proj": (
            "AscendRowParallelLinear",
            "AscendLinearMethod",
            "AscendW8A8DynamicLinearMethod",
        ),
        "model.layers.1.mlp.gate_up_proj": (
            "AscendMergedColumnParallelLinear",
            "AscendW4A4NpuLinearMethod",
            "W4A4NpuScheme",
        ),
        "model.layers.1.mlp.down_proj": ("AscendRowParallelLinear", "AscendUnquantizedLinearMethod", "NoneType"),
        "lm_head": ("AscendParallelLMHead", "UnquantizedEmbeddingMethod", "NoneType"),
    }


def test_layers_compute_what_the_operators_are_documented_to(model: torch.nn.Module) -> None:
    assert_layers_compute(model, MICRO)


def test_a_type_that_is_not_ours_runs_in_vllm_ascends_own_scheme(model: torch.nn.Module) -> None:
    reader, name = CheckpointReader(MICRO), "model.layers.0.self_attn.o_proj"
    x = inputs(256)
    found = model.get_submodule(name)(x)[0]
    expected = reference.w8a8_linear(x, reader.load(f"{name}.weight"), reader.load(f"{name}.weight_scale").squeeze(1))
    assert relative_error(found, expected) < SAME_ROUNDINGS


def test_the_table_names_every_kernel(config: VllmConfig, model: torch.nn.Module) -> None:
    rows = [line.split("  ") for line in config.quant_config.report.table().splitlines()[2:]]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["FLOAT", "2", "0.3 MiB", "vllm-ascend AscendUnquantizedLinearMethod"],
        ["W4A4_FLATQUANT_DYNAMIC", "4", "0.2 MiB", KRONECKER],
        ["W8A8_DYNAMIC", "2", "0.1 MiB", "vllm-ascend AscendW8A8DynamicLinearMethod"],
    ]


def test_the_doctor_planned_what_was_loaded(model: torch.nn.Module) -> None:
    """Bytes of the loaded W4A4 layers, whole layers with scales, offsets and transforms."""
    planned = plan_memory(read_model(MICRO), find_device("910B2"), Serving())
    loaded = sum(
        parameter.numel() * parameter.element_size()
        for name, layer in model.named_modules()
        if name.endswith(tuple(W4A4_LAYERS))
        for parameter in layer.parameters(recurse=False)
    )
    clip_ratios = 4 * sum(len(shards) for shards in W4A4_LAYERS.values()) * 2
    assert planned.weights["W4A4_FLATQUANT_DYNAMIC"] == loaded - clip_ratios


def reload(model: torch.nn.Module, config: VllmConfig, directory: Path) -> None:
    """What vLLM's model runner does for `reload_weights`."""
    loader = get_model_loader(config.load_config)
    config.model_config.model, before = str(directory), config.model_config.model
    try:
        initialize_layerwise_reload(model)
        model.load_weights(loader.get_all_weights(config.model_config, model))
        finalize_layerwise_reload(model, config.model_config)
    finally:
        config.model_config.model = before


@pytest.fixture
def other(micro_copy: Path, edit_tensors: Callable[..., None]) -> Path:
    """A checkpoint whose layers are swapped and clip more."""
    reader, swapped = CheckpointReader(MICRO), {}
    for name in reader.tensors:
        if name.startswith("model.layers."):
            layer = name.split(".")[2]
            swapped[name.replace(f"layers.{layer}.", f"layers.{1 - int(layer)}.", 1)] = reader.load(name)
    edit_tensors({name: t * 0.75 if name.endswith("clip_ratio") else t for name, t in swapped.items()})
    return micro_copy


def test_reloading(config: VllmConfig, model: torch.nn.Module, other: Path) -> None:
    """Another checkpoint, then the first one again; tensors stay where graphs have seen them."""
    layers = [layer for name, layer in model.named_modules() if name.endswith(tuple(W4A4_LAYERS))]
    addresses = [parameter.data_ptr() for layer in layers for parameter in layer.parameters()]
    reload(model, config, other)
    assert_layers_compute(model, other)
    reload(model, config, MICRO)
    assert_layers_compute(model, MICRO)
    assert [parameter.data_ptr() for layer in layers for parameter in layer.parameters()] == addresses


def test_compiled_graphs_see_reloaded_weights(
    config: VllmConfig, model: torch.nn.Module, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph without breaks: every operator has a fake implementation, nothing reads a tensor's value."""
    # The compiler would ask the accelerator for its stream, and there is none behind the stand-in.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    name = "model.layers.0.mlp.gate_up_proj"
    layer = model.get_submodule(name)
    compiled = torch.compile(
        lambda x: layer.quant_method.apply(layer, x, None), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    torch._dynamo.utils.counters.clear()
    for tokens in (7, 3):
        x = inputs(192, tokens)
        assert torch.equal(compiled(x), layer(x)[0])
    reload(model, config, other)
    x = inputs(192)
    found = compiled(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    reload(model, config, MICRO)
    assert relative_error(found, expected_output(CheckpointReader(other), name, x)) < SAME_ROUNDINGS


def test_a_clip_ratio_that_captured_graphs_would_keep_is_refused(other: Path) -> None:
    """aclnnFlatQuant takes it as an attribute, which a captured graph holds for good."""
    config = engine_config(MICRO)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    with set_current_vllm_config(config):
        model = get_model(vllm_config=config)
        reload(model, config, MICRO)  # the same values: nothing to refuse
        with pytest.raises(CheckpointError, match="captured graphs keep"):
            reload(model, config, other)


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
    layer.input_size, layer.output_size = 192, 256
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
    from vllm_ascend.quantization import modelslim_config

    asked: list[Any] = []

    def create(description: dict[str, Any], prefix: str, layer_type: str, packed: Any) -> Any:
        asked.append((prefix, layer_type, packed))
        raise InterruptedError

    monkeypatch.setattr(modelslim_config, "create_scheme_for_layer", create)
    for quant_config in mixed:
        with pytest.raises(InterruptedError):
            quant_config.get_quant_method(MagicMock(spec=FusedMoE), "model.layers.0.mlp.experts")
    assert asked[0] == asked[1]
    assert asked[0][1] == "moe"


def test_the_configuration_is_still_vllm_ascends(mixed: Any) -> None:
    ours, theirs = mixed
    assert isinstance(ours, AscendModelSlimConfig)
    assert ours.quant_description == theirs.quant_description
    for name in ("get_cache_scale", "is_c8_quant_layer"):
        argument = "model.layers.0.self_attn.k_proj.kv_cache_scale"
        assert getattr(ours, name)(argument) == getattr(theirs, name)(argument)
    assert ours.enable_c8_quant


def test_shards_of_different_types_are_refused(config: VllmConfig) -> None:
    description = {f"model.layers.0.self_attn.{p}_proj.weight": "W4A4_DYNAMIC" for p in "qk"}
    ours = AscendW4A4ModelSlimConfig({**description, "model.layers.0.self_attn.v_proj.weight": "FLOAT"})
    ours.packed_modules_mapping = PACKED
    with pytest.raises(CheckpointError, match="must have one quant type"):
        ours.get_quant_method(linear(), "model.layers.0.self_attn.qkv_proj")


def test_a_w4a4_layer_that_only_vllm_ascend_finds_is_not_silent(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Were its name resolution ahead of ours, its own scheme would run; that is said and shown in the table."""
    ours = AscendW4A4ModelSlimConfig({"model.layers.0.mlp.up_proj.weight": "W4A4_DYNAMIC"})
    monkeypatch.setattr(AscendW4A4ModelSlimConfig, "_has_w4a4_shard", lambda self, prefix: False)
    method = ours.get_quant_method(linear(), "model.layers.0.mlp.up_proj")
    assert classes(method)[1] == "AscendW4A4LaosDynamicLinearMethod"
    assert "not found in the description by the plugin" in ours.report.table()
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
