# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that must be refused while they load, each with a text that names what is wrong and where."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import DESCRIPTION, INDEX, MICRO, WEIGHTS
from tests.loading import engine_config, loaded_model
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader

ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.1.mlp"


def refused(directory: Path, *words: str, **arguments: Any) -> None:
    with pytest.raises(CheckpointError) as caught, loaded_model(directory, **arguments):
        pass
    text = str(caught.value)
    assert all(word in text for word in words), text


def tensor(name: str) -> torch.Tensor:
    return CheckpointReader(MICRO).load(name).clone()


def test_the_unedited_checkpoint_loads(micro_copy: Path) -> None:
    with loaded_model(micro_copy) as model:
        assert model.model.layers[0].self_attn.qkv_proj.left_trans.shape == (12, 12)


def test_no_description(micro_copy: Path) -> None:
    (micro_copy / DESCRIPTION).unlink()
    refused(micro_copy, f"{DESCRIPTION}: not found", "next to config.json")


@pytest.mark.parametrize(("text", "word"), [('{"version": ', "not valid JSON"), ("[1]", "expected a JSON object")])
def test_description_that_is_no_json_object(micro_copy: Path, text: str, word: str) -> None:
    (micro_copy / DESCRIPTION).write_text(text)
    refused(micro_copy, str(micro_copy / DESCRIPTION), word)


def test_description_with_a_value_that_is_no_type(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    edit_json(DESCRIPTION, {f"{ATTENTION}.q_proj.weight": 4})
    refused(micro_copy, f"{ATTENTION}.q_proj.weight", "must be a string", "found 4")


def test_unknown_type(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    edit_json(DESCRIPTION, {f"{MLP}.down_proj.weight": "W5A5"})
    refused(micro_copy, f"{MLP}.down_proj.weight", "unknown quant type 'W5A5'", "Known types")


def test_type_that_cannot_be_run_here(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    edit_json(DESCRIPTION, {f"{ATTENTION}.o_proj.weight": "W8A8_MIX"})
    refused(micro_copy, f"layer {ATTENTION}.o_proj: quant type W8A8_MIX cannot be run here", "W8A8_DYNAMIC")


def test_layer_missing_from_the_description(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    names = [name for name in json.loads((micro_copy / DESCRIPTION).read_text()) if name.startswith(f"{MLP}.up_proj")]
    edit_json(DESCRIPTION, remove=tuple(names))
    refused(micro_copy, f"{MLP}.up_proj", "has no entry")


def test_layer_missing_everywhere(
    micro_copy: Path, edit_json: Callable[..., None], edit_tensors: Callable[..., None]
) -> None:
    names = tuple(n for n in json.loads((micro_copy / DESCRIPTION).read_text()) if n.startswith(f"{MLP}.up_proj"))
    edit_json(DESCRIPTION, remove=names)
    edit_tensors(remove=names)
    refused(micro_copy, f"tensor {MLP}.up_proj.weight is in none of the weight files", "config.json has it")


def test_mixed_shards(micro_copy: Path, edit_json: Callable[..., None], edit_tensors: Callable[..., None]) -> None:
    quantized = ("weight_scale", "weight_offset", "left_trans", "right_trans", "clip_ratio")
    float_names = [f"{ATTENTION}.k_proj.{suffix}" for suffix in quantized]
    edit_json(DESCRIPTION, {f"{ATTENTION}.k_proj.weight": "FLOAT"}, remove=tuple(float_names))
    edit_tensors({f"{ATTENTION}.k_proj.weight": torch.zeros(128, 192).bfloat16()}, remove=tuple(float_names))
    refused(micro_copy, f"{ATTENTION}.q_proj: W4A4_FLATQUANT_DYNAMIC", f"{ATTENTION}.k_proj: FLOAT")


def test_wrong_dtype(micro_copy: Path, edit_tensors: Callable[..., None]) -> None:
    edit_tensors({f"{ATTENTION}.v_proj.weight": tensor(f"{ATTENTION}.v_proj.weight").to(torch.int32)})
    refused(micro_copy, WEIGHTS, f"tensor {ATTENTION}.v_proj.weight", "expected dtype I8", "found I32")


def test_wrong_shape(micro_copy: Path, edit_tensors: Callable[..., None]) -> None:
    edit_tensors({f"{ATTENTION}.v_proj.weight_scale": torch.ones(127, 1)})
    refused(micro_copy, f"tensor {ATTENTION}.v_proj.weight_scale", "[128, 1]", "[127, 1]")


@pytest.mark.parametrize("value", [8, -9, 100])
def test_int4_out_of_range(micro_copy: Path, edit_tensors: Callable[..., None], value: int) -> None:
    weight = tensor(f"{MLP}.gate_proj.weight")
    weight[7, 11] = value
    edit_tensors({f"{MLP}.gate_proj.weight": weight})
    refused(micro_copy, WEIGHTS, f"layer {MLP}.gate_up_proj", f"{MLP}.gate_proj.weight", "[-8, 7]", str(value))


@pytest.mark.parametrize("value", [0.0, -0.5, 1.0001, float("nan")])
def test_clip_out_of_range(micro_copy: Path, edit_tensors: Callable[..., None], value: float) -> None:
    edit_tensors({f"{ATTENTION}.q_proj.clip_ratio": torch.tensor([value])})
    refused(micro_copy, f"tensor {ATTENTION}.q_proj.clip_ratio", "expected a clip ratio in (0, 1]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", ["weight_scale", "left_trans", "right_trans", "weight_offset"])
def test_values_that_are_not_finite(
    micro_copy: Path, edit_tensors: Callable[..., None], suffix: str, value: float
) -> None:
    name = f"{ATTENTION}.q_proj.{suffix}"
    bad = tensor(name)
    bad[3, 0] = value
    edit_tensors({name: bad})
    refused(micro_copy, f"tensor {name}", "expected finite values", "found 1 of")


def test_index_names_a_missing_shard(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    index = json.loads((micro_copy / INDEX).read_text())
    edit_json(INDEX, {"weight_map": {**index["weight_map"], "lm_head.weight": "other.safetensors"}})
    refused(micro_copy, INDEX, "shard other.safetensors is missing")


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/elsewhere.safetensors"])
def test_index_names_a_shard_outside_the_directory(
    micro_copy: Path, edit_json: Callable[..., None], shard: str
) -> None:
    shutil.copy(micro_copy / WEIGHTS, micro_copy.parent / "elsewhere.safetensors")
    index = json.loads((micro_copy / INDEX).read_text())
    edit_json(INDEX, {"weight_map": {**index["weight_map"], "lm_head.weight": shard}})
    refused(micro_copy, INDEX, repr(shard), "outside the checkpoint directory")


def test_index_names_a_tensor_that_its_shard_lacks(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    index = json.loads((micro_copy / INDEX).read_text())
    edit_json(INDEX, {"weight_map": {**index["weight_map"], "model.extra.weight": WEIGHTS}})
    refused(micro_copy, INDEX, "model.extra.weight", "does not")


def test_two_indexes(micro_copy: Path) -> None:
    shutil.copy(micro_copy / INDEX, micro_copy / "model.safetensors.index.json")
    refused(micro_copy, "model.safetensors.index.json", INDEX)


@pytest.mark.parametrize("keep", [0, 5, 3000, -1])
def test_truncated_shard(micro_copy: Path, keep: int) -> None:
    data = (micro_copy / WEIGHTS).read_bytes()
    (micro_copy / WEIGHTS).write_bytes(data[:keep])
    refused(micro_copy, WEIGHTS, "not a whole safetensors file", "copy or download it again")


def test_no_weights_at_all(micro_copy: Path) -> None:
    (micro_copy / WEIGHTS).unlink()
    refused(micro_copy, f"shard {WEIGHTS} is missing")


def test_transforms_that_do_not_multiply_to_the_input_size(micro_copy: Path, edit_tensors: Callable[..., None]) -> None:
    edit_tensors({f"{MLP}.{p}_proj.left_trans": torch.eye(11) for p in ("gate", "up")})
    refused(micro_copy, f"layer {MLP}.gate_proj", "11 x 16", "192 input features")


@pytest.mark.parametrize("suffix", ["left_trans", "right_trans"])
def test_fused_shards_with_different_transforms(
    micro_copy: Path, edit_tensors: Callable[..., None], suffix: str
) -> None:
    name = f"{ATTENTION}.k_proj.{suffix}"
    edit_tensors({name: tensor(name) * 1.0001})
    refused(micro_copy, f"layer {ATTENTION}.qkv_proj", suffix, "expected the same values")


def test_fused_shards_with_different_clips(micro_copy: Path, edit_tensors: Callable[..., None]) -> None:
    name = f"{ATTENTION}.k_proj.clip_ratio"
    edit_tensors({name: tensor(name) * 0.9})
    refused(micro_copy, f"layer {ATTENTION}.qkv_proj", name, "differ by more than 0.001")


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "clip_ratio"])
def test_described_tensor_that_is_in_no_file(micro_copy: Path, edit_tensors: Callable[..., None], suffix: str) -> None:
    edit_tensors(remove=(f"{ATTENTION}.q_proj.{suffix}",))
    refused(micro_copy, f"tensor {ATTENTION}.q_proj.{suffix} is described", "in none of the weight files")


def test_unreadable_files(micro_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool leaves files with mode 0400. Tests may run as root, whom no mode stops, so the refusal is made up."""
    from vllm_w4a4_plugin.checkpoint import reader

    def deny(*args: Any, **kwargs: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(reader, "safe_open", deny)
    refused(micro_copy, WEIGHTS, "no permission to read it", "chmod")
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_text", deny)
    refused(micro_copy, DESCRIPTION, "no permission to read it", "chmod")


def test_config_of_another_model(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    edit_json("config.json", {"hidden_size": 256})
    refused(micro_copy, "model.embed_tokens.weight: expected shape [512, 256] (config.json), found [512, 192]")


def test_norm_missing_everywhere(
    micro_copy: Path, edit_json: Callable[..., None], edit_tensors: Callable[..., None]
) -> None:
    edit_json(DESCRIPTION, remove=("model.norm.weight",))
    edit_tensors(remove=("model.norm.weight",))
    refused(micro_copy, "model.norm.weight is in none of the weight files", "config.json has it")


def test_quantized_kv_cache(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    edit_json(DESCRIPTION, {"kv_quant_type": "C8"})
    refused(micro_copy, "kv_quant_type is 'C8'", "cannot be run on CPU")


@pytest.mark.parametrize(
    ("load_format", "reason"),
    [
        pytest.param(
            "fastsafetensors",
            "vLLM's loader for it puts tensors on a CUDA device",
            marks=pytest.mark.feature(
                "`--load-format fastsafetensors`", refused="vLLM puts its tensors on a CUDA device"
            ),
        ),
        pytest.param(
            "tensorizer",
            "it does not load the checkpoint's own tensors",
            marks=pytest.mark.feature(
                "`--load-format tensorizer`", refused="it does not load the checkpoint's own tensors"
            ),
        ),
        pytest.param(
            "pt",
            "it does not load the checkpoint's own tensors",
            marks=pytest.mark.feature("`--load-format pt`", refused="it does not load the checkpoint's own tensors"),
        ),
    ],
)
def test_load_formats_that_cannot_be_used(micro_copy: Path, load_format: str, reason: str) -> None:
    refused(micro_copy, f"load format '{load_format}' cannot be used here: {reason}", load_format=load_format)


@pytest.mark.feature("sleep mode", refused="vLLM's CPU platform has none")
def test_sleep_mode(micro_copy: Path) -> None:
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        engine_config(micro_copy, enable_sleep_mode=True)


def test_unsupported_platform_is_named(micro_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_w4a4_plugin.quantization import config

    class OtherPlatform:
        device_name = "cuda"

        @staticmethod
        def is_cpu() -> bool:
            return False

    monkeypatch.setattr(config, "current_platform", OtherPlatform)
    with pytest.raises(CheckpointError, match=r"runs on CPUs .* and on Ascend NPUs .*this vLLM runs on cuda"):
        engine_config(micro_copy)
