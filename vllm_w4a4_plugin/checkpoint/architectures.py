# SPDX-License-Identifier: Apache-2.0
"""The modules that vLLM's models are made of, by their names in checkpoints: one table entry for each architecture."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .model_config import EMBEDDING, HEAD, SizeError, check_positive, is_tied, size, text_config

ATTENTION, MLP = "self_attn", "mlp"
FUSED = {f"{ATTENTION}.qkv_proj": ("q_proj", "k_proj", "v_proj"), f"{MLP}.gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that some checkpoints store whole and most in parts; vLLM's models load both."""


@dataclass(frozen=True)
class Experts:
    """What a block has instead of an MLP: a router `gate` and numbered experts.

    Attributes:
        module: their parent within the block.
        projections: names of gate_proj, up_proj and down_proj of an expert.
        intermediate: the key of config.json with the width of an expert.
        shared: the key with the width of the expert that every token passes through, "" if there is none.
        everywhere: whether every block has them, whatever config.json says of single layers.
    """

    module: str = MLP
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    intermediate: str = "moe_intermediate_size"
    shared: str = ""
    everywhere: bool = False


@dataclass(frozen=True)
class Architecture:
    """A decoder-only language model of vLLM: q, k, v and o projections, then an MLP or experts, in each block.

    Attributes:
        model_types: values of `model_type` in config.json that go with it.
        defaults: of the keys of config.json that change shapes, where they are absent; those of transformers.
        biases: a projection -> the key of config.json that gives it a bias, "" for one that always has a bias.
        block_norms: the norms of a block that are as wide as the residual stream.
        has_head_norms: whether queries and keys are normed head by head.
        has_wide_norms: whether queries and keys are normed over all heads.
        reads_head_dim: whether `head_dim` counts; hidden_size / num_attention_heads where it does not or is absent.
        experts: what may be there instead of an MLP.
        is_fused: whether the layers of `FUSED` are always stored whole.
        activation: the key of config.json with the MLP's activation, and the only one that vLLM's model computes.
    """

    model_types: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    block_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    has_head_norms: bool = False
    has_wide_norms: bool = False
    reads_head_dim: bool = True
    experts: Experts | None = None
    is_fused: bool = False
    activation: tuple[str, str] = ("hidden_act", "silu")


_QKV = ("q_proj", "k_proj", "v_proj")
_QKV_BIAS = dict.fromkeys(_QKV, "attention_bias")
_ATTENTION_BIAS = {**_QKV_BIAS, "o_proj": "attention_bias"}
_LLAMA_BIASES = {
    **_ATTENTION_BIAS,
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp_bias"),
}
_QWEN3_DEFAULTS = {"num_key_value_heads": 32, "head_dim": 128}
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_GEMMA_DEFAULTS = {"num_key_value_heads": 4, "head_dim": 256}
_GEMMA_NORMS = ("input_layernorm", "pre_feedforward_layernorm", *_AFTER)
_GEMMA_ACTIVATION = ("hidden_activation", "gelu_pytorch_tanh")
_GLM_NORMS = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(("llama",), biases=_LLAMA_BIASES),
    "MistralForCausalLM": Architecture(("mistral",), {"num_key_value_heads": 8}, _LLAMA_BIASES),
    "Qwen2ForCausalLM": Architecture(
        ("qwen2",), {"num_key_value_heads": 32}, dict.fromkeys(_QKV, ""), reads_head_dim=False
    ),
    "MiMoForCausalLM": Architecture(
        ("mimo", "qwen2"), {"num_key_value_heads": 32}, dict.fromkeys(_QKV, ""), reads_head_dim=False
    ),
    "Qwen3ForCausalLM": Architecture(("qwen3",), _QWEN3_DEFAULTS, _ATTENTION_BIAS, has_head_norms=True),
    "Qwen3MoeForCausalLM": Architecture(
        ("qwen3_moe",), {"num_key_value_heads": 4}, _ATTENTION_BIAS, has_head_norms=True, experts=Experts()
    ),
    "Qwen2MoeForCausalLM": Architecture(
        ("qwen2_moe",),
        {"num_key_value_heads": 16, "qkv_bias": True},
        dict.fromkeys(_QKV, "qkv_bias"),
        experts=Experts(shared="shared_expert_intermediate_size"),
        reads_head_dim=False,
    ),
    "MixtralForCausalLM": Architecture(
        ("mixtral",),
        {"num_key_value_heads": 8},
        experts=Experts("block_sparse_moe", ("w1", "w3", "w2"), "intermediate_size", everywhere=True),
    ),
    "Glm4ForCausalLM": Architecture(
        ("glm4",), {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True}, _QKV_BIAS, _GLM_NORMS
    ),
    "Gemma2ForCausalLM": Architecture(
        ("gemma2",), _GEMMA_DEFAULTS, _ATTENTION_BIAS, _GEMMA_NORMS, activation=_GEMMA_ACTIVATION
    ),
    "Gemma3ForCausalLM": Architecture(
        ("gemma3_text",),
        _GEMMA_DEFAULTS,
        _ATTENTION_BIAS,
        _GEMMA_NORMS,
        has_head_norms=True,
        activation=_GEMMA_ACTIVATION,
    ),
    "Phi3ForCausalLM": Architecture(("phi3",), is_fused=True),
    "Olmo2ForCausalLM": Architecture(("olmo2",), {}, _ATTENTION_BIAS, _AFTER, has_wide_norms=True),
    "GraniteForCausalLM": Architecture(("granite",), biases=_LLAMA_BIASES),
    "SmolLM3ForCausalLM": Architecture(("smollm3",), {"num_key_value_heads": 4}, _LLAMA_BIASES),
}


def architecture_of(config: Mapping[str, Any]) -> str:
    """Name of the entry of `ARCHITECTURES` that vLLM would serve, "" if it is none of them."""
    if config.get("auto_map") and str(config.get("model_type")) not in _BY_MODEL_TYPE:
        return ""  # the model's own code may give keys another meaning
    names = config.get("architectures")
    if not names:
        return _BY_MODEL_TYPE.get(str(config.get("model_type")), "")
    return next((name for name in names if str(name) in ARCHITECTURES), "") if isinstance(names, list) else ""


_BY_MODEL_TYPE = {kind: name for name, entry in reversed(list(ARCHITECTURES.items())) for kind in entry.model_types}


@dataclass(frozen=True)
class ModuleShape:
    """A module that the model has.

    Attributes:
        shape: of its weight.
        bias: whether the model of config.json has one.
        takes_bias: whether it can have one all the same.
    """

    shape: tuple[int, ...]
    bias: bool = False
    takes_bias: bool = True


LIMIT_PER_MODULE, LEAST_LIMIT = 4, 1000
"""A model of more modules than so many for each stored one, and so many besides, is not that of the files; naming them
all could take any time and memory."""


class Decoder:
    """The model that config.json describes.

    Args:
        config: decoded; of a model whose architecture is in the table.

    Raises:
        SizeError: a size is missing or impossible, a switch is neither true nor false, or another value is not one
            with which vLLM can build the model and compute.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.architecture = ARCHITECTURES[architecture_of(config)]
        self.config = {**self.architecture.defaults, **text_config(config)}
        for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(self.config.get(key, False), bool):
                raise SizeError(f"{key} must be true or false, found {self.config[key]!r}")
        self._check_other_values()
        self.tied = is_tied(config)
        self.layers = size(self.config, "num_hidden_layers")
        kinds = self.config.get("layer_types")
        if isinstance(kinds, list) and len(kinds) != self.layers:
            raise SizeError(f"layer_types has {len(kinds)} entries, num_hidden_layers is {self.layers}")
        self.hidden, self.vocabulary = size(self.config, "hidden_size"), size(self.config, "vocab_size")
        self.heads = size(self.config, "num_attention_heads")
        self.kv_heads = size(self.config, "num_key_value_heads", self.heads)
        if self.heads % self.kv_heads:
            raise SizeError(
                f"num_attention_heads {self.heads} is not a multiple of num_key_value_heads {self.kv_heads}"
            )
        reads_head_dim = self.architecture.reads_head_dim
        self.head_dim = (
            size(self.config, "head_dim", self.hidden // self.heads) if reads_head_dim else self._even_head_dim()
        )

    def modules(self, stored: "set[str] | frozenset[str]" = frozenset()) -> dict[str, ModuleShape]:
        """Every module with weights, by name.

        Args:
            stored: names of the modules in the files; a fused layer is expected whole if it is there whole.

        Raises:
            SizeError: there are many times as many as are stored, or a size is missing or impossible.
        """
        most = LEAST_LIMIT + LIMIT_PER_MODULE * len(stored)
        modules = {f"model.{EMBEDDING}": ModuleShape((self.vocabulary, self.hidden), takes_bias=False)}
        if not self.tied or HEAD in stored:
            modules[HEAD] = ModuleShape((self.vocabulary, self.hidden), takes_bias=not self.tied)
        modules["model.norm"] = ModuleShape((self.hidden,))
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            modules.update((f"{block}.{name}", shape) for name, shape in self._block(layer))
            if len(modules) > most:
                raise SizeError(
                    f"num_hidden_layers {self.layers} and the number of experts make more than {most} modules, "
                    f"the files hold {len(stored)}"
                )
            for whole, leaves in FUSED.items():
                if f"{block}.{whole}" in stored or self.architecture.is_fused:
                    parent = f"{block}.{whole}".rpartition(".")[0]
                    parts = [modules.pop(f"{parent}.{leaf}") for leaf in leaves if f"{parent}.{leaf}" in modules]
                    if parts:
                        rows = sum(part.shape[0] for part in parts)
                        modules[f"{block}.{whole}"] = ModuleShape((rows, self.hidden), parts[0].bias)
        return modules

    def _block(self, layer: int) -> Iterator[tuple[str, ModuleShape]]:
        for name in self.architecture.block_norms:
            yield name, ModuleShape((self.hidden,))
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {"q_proj": (q, self.hidden), "k_proj": (kv, self.hidden), "v_proj": (kv, self.hidden)}
        for leaf, shape in {**sizes, "o_proj": (self.hidden, q)}.items():
            yield f"{ATTENTION}.{leaf}", self._linear(leaf, shape)
        if self.architecture.has_head_norms or self.architecture.has_wide_norms:
            is_wide = self.architecture.has_wide_norms
            for name, width in (("q_norm", q), ("k_norm", kv)):
                yield f"{ATTENTION}.{name}", ModuleShape((width if is_wide else self.head_dim,))
        experts = self.architecture.experts
        if experts is None or (not experts.everywhere and self._has_mlp(layer)):
            yield from self._mlp(MLP, size(self.config, "intermediate_size"))
        else:
            yield from self._mixture(experts)

    def _mixture(self, experts: Experts) -> Iterator[tuple[str, ModuleShape]]:
        count = size(self.config, "num_experts", self.config.get("num_local_experts"))
        yield f"{experts.module}.gate", ModuleShape((count, self.hidden), takes_bias=False)
        wide = (size(self.config, experts.intermediate), self.hidden)
        for number in range(count):
            for leaf, shape in zip(experts.projections, (wide, wide, wide[::-1]), strict=True):
                yield f"{experts.module}.experts.{number}.{leaf}", ModuleShape(shape, takes_bias=False)
        if experts.shared:
            yield from self._mlp(f"{experts.module}.shared_expert", size(self.config, experts.shared))
            yield f"{experts.module}.shared_expert_gate", ModuleShape((1, self.hidden), takes_bias=False)

    def _mlp(self, name: str, intermediate: int) -> Iterator[tuple[str, ModuleShape]]:
        for leaf in ("gate_proj", "up_proj"):
            yield f"{name}.{leaf}", self._linear(leaf, (intermediate, self.hidden))
        yield f"{name}.down_proj", self._linear("down_proj", (self.hidden, intermediate))

    def _linear(self, leaf: str, shape: tuple[int, int]) -> ModuleShape:
        key = self.architecture.biases.get(leaf)
        return ModuleShape(shape, bias=key == "" or bool(key and self.config.get(key)))

    def _check_other_values(self) -> None:
        for key in ("rms_norm_eps", "rope_theta"):
            check_positive(self.config, key)
        size(self.config, "max_position_embeddings", 1)
        without_experts = self.config.get("mlp_only_layers") or []
        if not isinstance(without_experts, list):
            raise SizeError(f"mlp_only_layers must be a list of numbers of layers, found {without_experts!r}")
        key, computed = self.architecture.activation
        if self.config.get(key, computed) not in (None, computed):
            raise SizeError(
                f"{key} must be {computed!r}, which vLLM computes in this model, found {self.config[key]!r}"
            )

    def _has_mlp(self, layer: int) -> bool:
        if layer in (self.config.get("mlp_only_layers") or ()):
            return True
        return (layer + 1) % size(self.config, "decoder_sparse_step", 1) != 0

    def _even_head_dim(self) -> int:
        if self.hidden % self.heads:
            raise SizeError(f"hidden_size {self.hidden} is not a multiple of num_attention_heads {self.heads}")
        return self.hidden // self.heads
