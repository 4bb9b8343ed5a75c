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
from vllm_w4a4_plugin.checkpoint.layers import layer_states
from vllm_w4a4_plugin.checkpoint.model_config import SizeError, is_tied, size, text_config
from vllm_w4a4_plugin.checkpoint.runnable import ON_NPU, Kind
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
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
        experts, experts_per_token: of a mixture, in each block; 0 where there are none.
        has_whole_experts: whether the experts are those of one rank of an expert parallelism, which no other rank
            shares; otherwise tensor parallelism divides each of them.
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
    experts: int = 0
    experts_per_token: float = 0
    has_whole_experts: bool = False

    @property
    def decoder_linears(self) -> tuple[LinearSpec, ...]:
        """Those through which every token passes, without vision towers; all of them if their names do not tell."""
        return tuple(linear for linear in self.linears if _DECODER_LAYER.match(linear.name)) or self.linears


def read_model(directory: Path, recipe: str = "tutorial") -> Model:
    """A model from a directory: its weight headers if it has weights, else its config.json and a recipe.

    Raises:
        CheckpointError: the directory lacks what is needed, or the model is not a dense decoder.
    """
    reader = CheckpointReader(directory)
    try:
        if is_checkpoint(reader):
            return _from_headers(reader, text_config(reader.config))
        return _from_config(directory, reader.config, recipe)
    except SizeError as error:
        raise CheckpointError(f"{directory}/config.json: {error}, so the model cannot be planned.") from None


def is_checkpoint(reader: CheckpointReader) -> bool:
    """Whether there are quantized weights, and not a config.json alone or a float model."""
    return reader.has_weights and (reader.directory / DESCRIPTION_FILE).exists()


def _from_headers(reader: CheckpointReader, config: Mapping[str, Any]) -> Model:
    inventory = Inventory.of(reader)
    linears = []
    experts: set[str] = set()
    for layer in layer_states(inventory, ON_NPU):
        if layer.plan is None:
            raise CheckpointError(layer.fault)
        if layer.kind is Kind.EXPERTS:
            experts.add(layer.name.rpartition(".experts.")[2].partition(".")[0])
        if layer.plan.spec is not None:
            linears.append(layer.plan.spec)
        elif len(layer.shape) == 2:
            linears.append(LinearSpec(layer.name, layer.plan.quant_type, *layer.shape))
    of_linears = {linear.name for linear in linears}
    others = [
        info
        for name, info in reader.tensors.items()
        if name.rpartition(".")[0] not in of_linears and "embed_tokens" not in name and not inventory.is_useless(name)
    ]
    heads = [linear for linear in linears if split_of(linear) == VOCABULARY]
    tied = is_tied(reader.config)
    return Model(
        tuple(linear for linear in linears if linear not in heads),
        heads[0] if heads and not tied else None,
        (size(config, "vocab_size"), size(config, "hidden_size")),
        sum(2 * prod(info.shape) for info in others),
        *_attention(config),
        stored_bytes=sum(info.nbytes for info in reader.tensors.values()),
        source=f"weight headers of {reader.directory}",
        experts=len(experts),
        experts_per_token=size(config, "num_experts_per_tok", 1) if experts else 0,
    )


def _from_config(directory: Path, config: Mapping[str, Any], recipe: str) -> Model:
    """A dense decoder of the Llama, Qwen2, Qwen3 kind, quantized by a recipe."""
    config, whole = text_config(config), config
    for part, keys in {
        "model with experts": ("num_experts", "n_routed_experts", "num_local_experts"),
        "vision-language model": ("vision_config",),
    }.items():
        if any(key in whole or config.get(key) for key in keys):
            raise CheckpointError(
                f"{directory}: a {part} can only be planned from its quantized weights, and there are none here."
            )
    hidden, mlp, vocabulary = (size(config, key) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    layers, kv_heads, head = _attention(config)[:3]
    heads = size(config, "num_attention_heads")
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
    tied = is_tied(whole)
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
    heads = size(config, "num_attention_heads")
    head_dim = size(config, "head_dim", size(config, "hidden_size") // heads)
    kv_heads = size(config, "num_key_value_heads", heads)
    return size(config, "num_hidden_layers"), kv_heads, head_dim, config.get("intermediate_size") or 0


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
