# SPDX-License-Identifier: Apache-2.0
"""What config.json says of a model's layers, as far as their names and sizes follow from it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inventory import Inventory

PLAIN_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose blocks are q, k, v, o, gate, up and down projections with a norm before each half."""

HEAD, EMBEDDING = "lm_head", "embed_tokens"

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def layer_number(name: str) -> int | None:
    """Number of the block that a tensor or module belongs to, None if to none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model; of most models all of it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the token embedding."""
    return bool(text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


@dataclass(frozen=True)
class PlainDecoder:
    """A dense decoder-only model.

    Attributes:
        layers: number of blocks.
        hidden, intermediate: width of the residual stream and of the MLP.
        heads, kv_heads, head_dim: of the attention.
        vocabulary: rows of embedding and head.
        tied: whether the head is the embedding.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "PlainDecoder | None":
        """The model that config.json describes, None if it is of another kind or says too little."""
        if config.get("model_type") not in PLAIN_DECODERS:
            return None
        keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        sizes = [config.get(key) for key in keys]
        numbers = [size for size in sizes if isinstance(size, int) and size > 0]
        if len(numbers) < len(keys):
            return None
        layers, hidden, intermediate, heads, vocabulary = numbers
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        return cls(layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, is_tied(config))

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name within a block -> (output_size, input_size)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every weight that the model cannot do without: module name and shape."""
        yield f"model.{EMBEDDING}", (self.vocabulary, self.hidden)
        if not self.tied:
            yield HEAD, (self.vocabulary, self.hidden)
        yield "model.norm", (self.hidden,)
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{block}.{name}", (self.hidden,)
            for name, shape in self.linears().items():
                yield f"{block}.{name}", shape


def config_findings(inventory: "Inventory", directory: Path) -> Iterator[str]:
    """Where the stored weights are not those of the model that config.json describes; for `PLAIN_DECODERS`."""
    model = PlainDecoder.of(inventory.config)
    if model is None:
        return
    for module, shape in model.weights():
        info = inventory.module(module).get("weight")
        if info is None:
            yield (
                f"{directory}: tensor {module}.weight is in none of the weight files, but the model of config.json has "
                "it. The checkpoint is incomplete, or config.json is that of another model."
            )
        elif info.shape != shape:
            yield (
                f"{info.file}: layer {module}, tensor {info.name}: expected shape {list(shape)} (config.json), found "
                f"{list(info.shape)}. config.json and weights come from different models."
            )
    for name, info in inventory.tensors.items():
        number = layer_number(name)
        if number is not None and number >= model.layers and not inventory.is_useless(name):
            yield (
                f"{info.file}: tensor {name} belongs to layer {number}, but the model of config.json has "
                f"{model.layers} layers (num_hidden_layers). config.json and weights come from different models."
            )
