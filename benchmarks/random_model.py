# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with random weights and the shapes of a real model: speed and memory do not depend on the values."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from math import sqrt
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint import DESCRIPTION_FILE, QuantType
from vllm_w4a4_plugin.checkpoint.spec import kronecker_sizes

from .shapes import Model

W4A4, W8A8, FLOAT = QuantType.W4A4_FLATQUANT_DYNAMIC, QuantType.W8A8_DYNAMIC, QuantType.FLOAT
TUTORIAL = {"q": W4A4, "k": W4A4, "v": W4A4, "o": W8A8, "gate": W4A4, "up": W4A4, "down": FLOAT}
RECIPES: dict[str, Mapping[str, QuantType]] = {
    "float": dict.fromkeys(TUTORIAL, FLOAT),
    "tutorial": TUTORIAL,
    "all-w4a4": dict.fromkeys(TUTORIAL, W4A4),
}
MLP = ("gate", "up", "down")
GPTQ = "gptq"
"""The recipe of vLLM's own int4 layers: 4-bit weights in groups of 128 along the input, or one group."""

GPTQ_GROUP = 128
_POOL_VALUES = 1 << 24


def make(directory: Path, model: Model, layers: int, recipe: str) -> None:
    """Write a Qwen3 or Qwen3-MoE checkpoint: config, weights (one shard per layer), the description of W4A4 recipes.

    Args:
        recipe: one of RECIPES, or GPTQ; with experts, not one that `splits_experts`.
    """
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    floats = (torch.randn(_POOL_VALUES, generator=generator) * 0.02).bfloat16()
    integers = torch.randint(-7, 8, (_POOL_VALUES,), generator=generator, dtype=torch.int8)
    weight_map: dict[str, str] = {}
    types: dict[str, str] = {}
    for index in range(-1, layers):
        tensors: dict[str, Tensor] = {}
        if index < 0:
            parts = _outer(model, floats)
        elif recipe == GPTQ:
            parts = _gptq_layer(model, index)
        else:
            parts = _layer(model, index, RECIPES[recipe], floats, integers)
        for name, tensor, kind in parts:
            tensors[name], types[name] = tensor, kind.value
        shard = f"model-{index + 2:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, directory / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    _write(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config = _config(model, layers)
    if recipe == GPTQ:
        config["quantization_config"] = {
            "quant_method": "gptq", "bits": 4, "group_size": _gptq_group(model), "desc_act": False, "sym": True,
        }  # fmt: skip
    _write(directory / "config.json", config)
    if any(kind is not FLOAT for kind in RECIPES.get(recipe, {}).values()):
        _write(directory / DESCRIPTION_FILE, {"model_quant_type": W4A4.value, **types})


def step_bytes(model: Model, layers: int, recipe: str, float_bytes: int) -> int:
    """Bytes of weights that a decode step of one request reads: all linear layers, of experts those that it chooses,
    and the output head, which the plugin holds in integers (VLLM_W4A4_HEAD); int4 as half a byte."""
    size = {W4A4: 0.5, W8A8: 1.0, FLOAT: float_bytes}
    types = dict.fromkeys(TUTORIAL, W4A4) if recipe == GPTQ else RECIPES[recipe]
    inner = sum(uses(model, name) * n * k * size[types[name]] for name, (n, k) in shapes(model).items())
    inner += float_bytes * router_values(model)
    is_ours = any(kind is not FLOAT for kind in RECIPES.get(recipe, {}).values())
    head = {"float": float_bytes, "int8": size[W8A8], "int4": size[W4A4]}[envs.VLLM_W4A4_HEAD if is_ours else "float"]
    return round(layers * inner + head * model.vocabulary * model.hidden)


def splits_experts(recipe: str) -> bool:
    """Whether gate, up and down have different types, which experts cannot have."""
    return recipe in RECIPES and len({RECIPES[recipe][short] for short in MLP}) > 1


def uses(model: Model, short: str) -> int:
    """How many matrices of the name `short` a token goes through in one layer."""
    return model.experts.top_k if model.experts is not None and short in MLP else 1


def router_values(model: Model) -> int:
    """Weights of a layer's router."""
    return 0 if model.experts is None else model.experts.count * model.hidden


def shapes(model: Model) -> dict[str, tuple[int, int]]:
    """(output_size, input_size) of each linear layer of a block; gate, up and down are those of one expert."""
    attention, key_value = model.heads * model.head_dim, model.kv_heads * model.head_dim
    return {
        "q": (attention, model.hidden),
        "k": (key_value, model.hidden),
        "v": (key_value, model.hidden),
        "o": (model.hidden, attention),
        "gate": (model.intermediate, model.hidden),
        "up": (model.intermediate, model.hidden),
        "down": (model.hidden, model.intermediate),
    }


def _projections(model: Model) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Name within a layer, short name and (output_size, input_size) of each linear layer, of every expert too."""
    for short, size in shapes(model).items():
        if short not in MLP:
            yield f"self_attn.{short}_proj.", short, size
        elif model.experts is None:
            yield f"mlp.{short}_proj.", short, size
        else:
            for expert in range(model.experts.count):
                yield f"mlp.experts.{expert}.{short}_proj.", short, size


def _outer(model: Model, floats: Tensor) -> Iterator[tuple[str, Tensor, QuantType]]:
    yield "model.embed_tokens.weight", _take(floats, model.vocabulary, model.hidden), FLOAT
    yield "model.norm.weight", torch.ones(model.hidden, dtype=torch.bfloat16), FLOAT


def _layer(
    model: Model, index: int, recipe: Mapping[str, QuantType], floats: Tensor, integers: Tensor
) -> Iterator[tuple[str, Tensor, QuantType]]:
    prefix = f"model.layers.{index}."
    yield from _common(model, prefix)
    for name, short, (output_size, input_size) in _projections(model):
        name, kind = prefix + name, recipe[short]
        if kind is FLOAT:
            yield f"{name}weight", _take(floats, output_size, input_size), kind
            continue
        yield f"{name}weight", _take(integers, output_size, input_size), kind
        yield f"{name}weight_scale", torch.full((output_size, 1), 0.2 / sqrt(input_size)), kind
        yield f"{name}weight_offset", torch.zeros(output_size, 1), kind
        if kind is W4A4:
            left, right = (model.heads, None) if short == "o" else kronecker_sizes(input_size)
            # Copies: safetensors refuses tensors that share memory.
            yield f"{name}left_trans", _orthogonal(left).clone(), kind
            if right is not None:
                yield f"{name}right_trans", _orthogonal(right).clone(), kind
            yield f"{name}clip_ratio", torch.tensor([0.9]), kind


def _gptq_layer(model: Model, index: int) -> Iterator[tuple[str, Tensor, QuantType]]:
    prefix = f"model.layers.{index}."
    yield from _common(model, prefix)
    generator = torch.Generator().manual_seed(0)
    for name, _, (output_size, input_size) in _projections(model):
        name = prefix + name
        packed = torch.randint(-(2**31), 2**31 - 1, (input_size // 8, output_size), generator=generator)
        groups = max(1, input_size // _gptq_group(model))
        yield f"{name}qweight", packed.int(), FLOAT
        # Symmetric weights have the zero point 8, which GPTQ stores less one.
        yield f"{name}qzeros", torch.full((groups, output_size // 8), 0x77777777, dtype=torch.int32), FLOAT
        yield f"{name}scales", torch.full((groups, output_size), 0.2 / sqrt(input_size)).half(), FLOAT
        yield f"{name}g_idx", (torch.arange(input_size) // (input_size // groups)).int(), FLOAT


def _gptq_group(model: Model) -> int:
    divides = all(input_size % GPTQ_GROUP == 0 for _, input_size in shapes(model).values())
    return GPTQ_GROUP if divides else GPTQ_GROUP // 2


def _common(model: Model, prefix: str) -> Iterator[tuple[str, Tensor, QuantType]]:
    """What no recipe quantizes: norms and the router."""
    for norm, size in (("input_layernorm", model.hidden), ("post_attention_layernorm", model.hidden),
                       ("self_attn.q_norm", model.head_dim), ("self_attn.k_norm", model.head_dim)):  # fmt: skip
        yield f"{prefix}{norm}.weight", torch.ones(size, dtype=torch.bfloat16), FLOAT
    if model.experts is not None:
        router = torch.randn(model.experts.count, model.hidden, generator=torch.Generator().manual_seed(1))
        yield f"{prefix}mlp.gate.weight", router.bfloat16(), FLOAT


@cache
def _orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(size)))[0].contiguous()


def _take(pool: Tensor, rows: int, columns: int) -> Tensor:
    return pool.repeat(-(-rows * columns // pool.numel()))[: rows * columns].view(rows, columns).clone()


def _config(model: Model, layers: int) -> dict[str, object]:
    architecture: dict[str, object] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    if model.experts is not None:
        architecture = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": model.experts.count,
            "num_experts_per_tok": model.experts.top_k,
            "moe_intermediate_size": model.intermediate,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return architecture | {
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _write(file: Path, data: Mapping[str, object]) -> None:
    file.write_text(json.dumps(data, indent=1) + "\n")
