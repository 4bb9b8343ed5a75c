# SPDX-License-Identifier: Apache-2.0
"""Tiny Qwen vision-language models with random weights: as transformers models, and as checkpoints in our format."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.conftest import DESCRIPTION
from vllm_w4a4_plugin.checkpoint import QuantType

WORDS = 200
"""The vocabulary has w0, w1, ..., whose numbers are their ids, then the special tokens."""
SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_end|>")
VISION_START, VISION_END, IMAGE, VIDEO, END = range(WORDS, WORDS + len(SPECIAL))
TOKEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
TEXT = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": END,
}
TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 96,
    "out_hidden_size": TEXT["hidden_size"],
    "initializer_range": 0.1,
}
FACTORS = {"left_trans": 8, "right_trans": 16}
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Leaves of type W4A4_FLATQUANT_DYNAMIC -> the layer of vLLM that they are part of; its parts share the transform."""
MODELS = ("qwen2_5_vl", "qwen3_vl")


def new_model(name: str) -> PreTrainedModel:
    """A float32 model with random weights; norms and biases are random as well."""
    torch.manual_seed(7)
    model = _qwen2_5_vl() if name == "qwen2_5_vl" else _qwen3_vl()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return model.eval()


def _qwen2_5_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    tower = {**TOWER, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=tower, **TOKEN_IDS)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> PreTrainedModel:
    rope = {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6], "mrope_interleaved": True
    }  # fmt: skip
    tower = {**TOWER, "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text = {**TEXT, "head_dim": 32, "rope_parameters": rope}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=tower, **TOKEN_IDS))


def published_name(name: str, parameter: str) -> str:
    """A parameter's name in published checkpoints of the model, which msModelSlim keeps."""
    if name == "qwen2_5_vl":
        return parameter.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
    return parameter


def write_model(name: str, directory: Path, describe_tower: bool) -> None:
    """A checkpoint directory: text part quantized by the tutorial's recipe, vision tower float.

    Args:
        name: one of MODELS.
        directory: to write to.
        describe_tower: whether the description has entries for the vision tower.
    """
    model = new_model(name)
    tensors: dict[str, torch.Tensor] = {}
    types: dict[str, str] = {}
    for parameter, value in model.state_dict().items():
        module, _, suffix = published_name(name, parameter).rpartition(".")
        is_text = "visual" not in module
        kind = quant_type(module) if is_text else QuantType.FLOAT
        if kind is QuantType.FLOAT or suffix == "bias":
            new, kind = {suffix: value.contiguous()}, QuantType.FLOAT
        else:
            new = dict(_quantize(value, kind, module))
        tensors |= {f"{module}.{key}": tensor for key, tensor in new.items()}
        if is_text or describe_tower:
            types |= dict.fromkeys((f"{module}.{key}" for key in new), kind.value)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / DESCRIPTION).write_text(json.dumps({"version": "1.0.0", "group_size": 0, **types}))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    _write_processor(name, directory)


def write_float_model(name: str, directory: Path) -> None:
    """The float model of `new_model`, with names as it is published.

    Args:
        name: one of MODELS.
        directory: to write to.
    """
    model = new_model(name)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {published_name(name, key): value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    _write_processor(name, directory)


def quant_type(module: str) -> QuantType:
    """Type of a module of the text part in the tutorial's recipe."""
    leaf = module.rpartition(".")[2]
    if leaf in FUSED:
        return QuantType.W4A4_FLATQUANT_DYNAMIC
    return QuantType.W8A8_DYNAMIC if leaf == "o_proj" else QuantType.FLOAT


def _quantize(weight: torch.Tensor, kind: QuantType, module: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a linear by suffix: weights rounded to nearest, transforms near the identity."""
    largest = 127
    if kind is QuantType.W4A4_FLATQUANT_DYNAMIC:
        largest = 7
        parent, _, leaf = module.rpartition(".")
        generator = torch.Generator().manual_seed(crc32(f"{parent}.{FUSED[leaf]}".encode()))
        for suffix, size in FACTORS.items():
            yield suffix, torch.eye(size) + 0.1 * torch.randn(size, size, generator=generator)
        yield "clip_ratio", torch.tensor([0.9])
    scale = weight.abs().amax(1, keepdim=True) / largest
    yield "weight", (weight / scale).round().to(torch.int8)
    yield "weight_scale", scale
    yield "weight_offset", torch.zeros_like(scale)


def _write_processor(name: str, directory: Path) -> None:
    """The smallest tokenizer and image processor that transformers accepts."""
    words = [f"w{number}" for number in range(WORDS)]
    vocabulary = {word: number for number, word in enumerate([*words, *SPECIAL])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[-1], pad_token=SPECIAL[-1], additional_special_tokens=SPECIAL[:-1]
    ).save_pretrained(directory)
    patch = 14 if name == "qwen2_5_vl" else 16
    processor: dict[str, Any] = {
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": (4 * patch) ** 2,
        "max_pixels": (8 * patch) ** 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor" if name == "qwen2_5_vl" else "Qwen3VLProcessor",
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
