# SPDX-License-Identifier: Apache-2.0
"""The weights of a model, from a checkpoint's headers or from config.json alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.model_config import is_tied
from vllm_w4a4_plugin.checkpoint.plan import plan_layer
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.checkpoint.types import WEIGHT
from vllm_w4a4_plugin.checkpoint.verify import linear_modules
from vllm_w4a4_plugin.constants import DESCRIPTION_FILE

from .partition import VOCABULARY, split_of

_DECODER_LAYER = re.compile(r"(?:model\.|language_model\.)*layers\.\d+\.")


@dataclass(frozen=True)
class Model:
    """What has to be known of a model to plan its memory, kernels and step times.

    Attributes:
        linears: all linear layers except the output head.
        head: the output head, None if it is tied to the embedding.
        embedding: [vocabulary, hidden] of the token embedding.
        other_bytes: of norms and whatever else every rank holds, 2 bytes per value.
        layers, kv_heads, head_dim: of the attention.
        intermediate: width of the MLP.
        stored_bytes: of all tensors in the checkpoint's files.
        source: what it was read from, in words.
    """

    linears: tuple[LinearSpec, ...]
    head: LinearSpec | None
    embedding: tuple[int, int]
    other_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    intermediate: int
    stored_bytes: int
    source: str

    @property
    def decoder_linears(self) -> tuple[LinearSpec, ...]:
        """Those that every token passes: all but the layers of a vision tower. All of them where no name tells."""
        return tuple(linear for linear in self.linears if _DECODER_LAYER.match(linear.name)) or self.linears


def read_model(directory: Path, recipe: str = "tutorial") -> Model:
    """A model from a directory: its weight headers if it has weights, else its config.json and a recipe.

    Raises:
        CheckpointError: the directory lacks what is needed, or the model is not a dense decoder.
    """
    reader = CheckpointReader(directory)
    config = reader.config.get("text_config") or reader.config
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(config.get(key), int):
            raise CheckpointError(f"{directory}/config.json: {key} is missing, so the model cannot be planned.")
    if reader.has_weights and (directory / DESCRIPTION_FILE).exists():
        return _from_headers(reader, config)
    if "vision_config" in reader.config:
        raise CheckpointError(
            f"{directory}: a vision-language model can only be planned from its quantized weights, and there are none "
            "here."
        )
    return _from_config(directory, config, recipe)


def _from_headers(reader: CheckpointReader, config: Mapping[str, Any]) -> Model:
    inventory = Inventory.of(reader)
    linears = []
    for name in linear_modules(inventory):
        plan = plan_layer(name, inventory, {})
        weight = inventory.module(name).get(WEIGHT)
        if plan.spec is not None:
            linears.append(plan.spec)
        elif weight is not None and len(weight.shape) == 2:
            linears.append(LinearSpec(name, plan.quant_type, *weight.shape))
    of_linears = {linear.name for linear in linears}
    others = [
        info
        for name, info in reader.tensors.items()
        if name.rpartition(".")[0] not in of_linears and "embed_tokens" not in name
    ]
    heads = [linear for linear in linears if split_of(linear) == VOCABULARY]
    tied = is_tied(reader.config)
    return Model(
        tuple(linear for linear in linears if linear not in heads),
        heads[0] if heads and not tied else None,
        (config["vocab_size"], config["hidden_size"]),
        sum(2 * prod(info.shape) for info in others),
        *_attention(config),
        stored_bytes=sum(info.nbytes for info in reader.tensors.values()),
        source=f"weight headers of {reader.directory}",
    )


def _from_config(directory: Path, config: Mapping[str, Any], recipe: str) -> Model:
    """A dense decoder of the Llama, Qwen2, Qwen3 kind, quantized by a recipe."""
    if any(config.get(key) for key in ("num_experts", "n_routed_experts", "num_local_experts")):
        raise CheckpointError(
            f"{directory}: a model with experts can only be planned from the headers of its weights, and it has none."
        )
    hidden, mlp, vocabulary = config["hidden_size"], config.get("intermediate_size"), config["vocab_size"]
    if not isinstance(mlp, int):
        raise CheckpointError(f"{directory}/config.json: intermediate_size is missing, so the model cannot be planned.")
    layers, kv_heads, head = _attention(config)[:3]
    heads = config["num_attention_heads"]
    sizes = {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (kv_heads * head, hidden),
        "self_attn.v_proj": (kv_heads * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    biased = config.get("attention_bias") or config.get("model_type") == "qwen2"
    linears = []
    for number in range(layers):
        block = f"model.layers.{number}"
        for name, kind in _recipe_types(recipe, block).items():
            output_size, input_size = sizes[name]
            left, right = _factors(kind, name, input_size, head)
            has_bias = bool(biased and name.startswith("self_attn") and not name.endswith("o_proj"))
            has_offset = kind.spec.is_quantized
            linears.append(
                LinearSpec(f"{block}.{name}", kind, output_size, input_size, 1, left, right, has_offset, has_bias)
            )
    head_linear = LinearSpec("lm_head", QuantType.FLOAT, vocabulary, hidden)
    tied = bool(config.get("tie_word_embeddings"))
    norms = layers * (2 * hidden + (2 * head if config.get("model_type") == "qwen3" else 0)) + hidden
    return Model(
        tuple(linears),
        None if tied else head_linear,
        (vocabulary, hidden),
        2 * norms,
        *_attention(config),
        stored_bytes=sum(_stored(linear) for linear in (*linears, head_linear)) + 2 * (vocabulary * hidden + norms),
        source=f"{directory}/config.json and the recipe {recipe!r}",
    )


def _attention(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return config["num_hidden_layers"], kv_heads, head_dim, config.get("intermediate_size") or 0


def _recipe_types(recipe: str, block: str) -> dict[str, QuantType]:
    from vllm_w4a4_plugin.calibration.model.structure import Group, Role
    from vllm_w4a4_plugin.calibration.recipe import load_recipe

    groups = {
        Role.QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        Role.O: ("self_attn.o_proj",),
        Role.GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
        Role.DOWN: ("mlp.down_proj",),
    }
    types = load_recipe(recipe).of_block(block, {role: Group(role, names) for role, names in groups.items()})
    return {name: types[role] for role, names in groups.items() for name in names}


def _factors(kind: QuantType, name: str, input_size: int, head_dim: int) -> tuple[int | None, int | None]:
    from vllm_w4a4_plugin.calibration.transforms.sizes import factor_sizes

    if not kind.spec.has_transform:
        return None, None
    if name.endswith("o_proj"):
        return input_size // head_dim, None  # the factor over head_dim is folded into v_proj
    sizes = factor_sizes(input_size)
    return sizes.left, sizes.right


def _stored(linear: LinearSpec) -> int:
    """Bytes in the files: one int4 value per byte, scales and offsets in float32."""
    values = linear.output_size * linear.input_size
    bias = 2 * linear.output_size if linear.has_bias else 0
    if not linear.quant_type.spec.is_quantized:
        return 2 * values + bias
    factors = 4 * sum(size**2 for size in (linear.left, linear.right) if size)
    factors += 4 if factors else 0  # clip_ratio
    return values + 8 * linear.output_size * linear.groups + factors + bias
