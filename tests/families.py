# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family that can be quantized, and an independent model of their checkpoints.

The arithmetic of `FakeQuantized` is written from the description of the checkpoint format, with a dense Kronecker
product, and uses nothing of the package.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import DESCRIPTION, MICRO

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_SLIDING = {"sliding_window": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_DENSE = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_EXPERT = "mlp.experts"
_SHARED = tuple(f"mlp.shared_expert.{leaf}_proj" for leaf in ("gate", "up", "down"))


_ATTEMPTS = 200
_DECIDED = 2e-5  # of a code; float32 leaves errors of some 5e-6 there


@dataclass(frozen=True)
class Family:
    """What is known of a family.

    Attributes:
        architecture: in config.json.
        changes: of the tiny model's config.
        quantized: layers of its first block that are quantized, experts by the name of their module.
        floats: modules of its first block that stay FLOAT.
        plain: roles of its first block whose transforms have no diagonal.
        is_served: whether vLLM's CPU backend computes it in float32, so that its logits can be compared.
    """

    architecture: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    quantized: tuple[str, ...] = _DENSE
    floats: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    is_served: bool = True


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", _SLIDING),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM", {**_SLIDING, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **_SLIDING,
            "num_hidden_layers": 4,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"],
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {**_SLIDING, "original_max_position_embeddings": 512},
        ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    ),
    "glm4": Family("Glm4ForCausalLM", {}, (*_ATTENTION, "mlp.gate_up_proj", "mlp.down_proj")),
    "olmo2": Family("Olmo2ForCausalLM", plain=("qkv", "gate_up")),
    "granite": Family(
        "GraniteForCausalLM", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
    ),
    "smollm3": Family("SmolLM3ForCausalLM", {"num_hidden_layers": 4}),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        {**_EXPERTS, "shared_expert_intermediate_size": 96, "mlp_only_layers": [1]},
        (*_ATTENTION, *_SHARED, _EXPERT),
        ("mlp.gate", "mlp.shared_expert_gate"),
        ("gate_up",),
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _EXPERTS, (*_ATTENTION, _EXPERT), ("mlp.gate",)),
    "mixtral": Family(
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        (*_ATTENTION, "block_sparse_moe.experts"),
        ("mlp.gate",),
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 96,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["full_attention", "linear_attention"],
        },
        (*_ATTENTION, *_SHARED, _EXPERT),
        ("mlp.gate", "mlp.shared_expert_gate"),
        ("gate_up",),
        is_served=False,
    ),
}


def write_model(family: str, directory: Path, **changes: Any) -> Path:
    """Write the float model of a family, with the micro checkpoint's tokenizer; norms and biases are random as well.

    `changes` are made to its config.
    """
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family].changes, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_((torch.rand_like(parameter) + 0.5) * (0.2 if "bias" in name else 1))
            elif "experts" in name or "gate.weight" in name:
                parameter.normal_(0, 0.08)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(MICRO / name, directory / name)
    return directory


class FakeQuantized(nn.Module):
    """One quantized linear layer in float arithmetic.

    Args:
        kind: its type in the description.
        tensors: as stored, by suffix.

    Attributes:
        margins: how far activations were from those that would be rounded to the next code, in codes.
    """

    def __init__(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        weight = tensors["weight"].float() - tensors["weight_offset"]
        self.weight, self.bias = weight * tensors["weight_scale"], tensors.get("bias")
        self.margins = torch.empty(0)
        self.top = 127 if kind == "W8A8_DYNAMIC" else 7
        self.clip, self.transform = 1.0, torch.eye(weight.shape[1])
        if kind == "W4A4_FLATQUANT_DYNAMIC":
            self.clip, left = tensors["clip_ratio"].item(), tensors["left_trans"]
            rest = torch.eye(weight.shape[1] // len(left))
            self.transform = torch.kron(left, tensors.get("right_trans", rest))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.transform
        scale = (self.clip / self.top) * x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        codes = x / scale
        self.margins = torch.cat([self.margins, (codes - codes.floor() - 0.5).abs().flatten()])
        codes = codes.round().clamp(-self.top - 1, self.top)
        return nn.functional.linear(codes * scale, self.weight, None if self.bias is None else self.bias.float())


class FakeExperts(nn.Module):
    """The experts of a layer, from gate, up and down of each; called as transformers calls its own."""

    def __init__(self, experts: Sequence[Sequence[FakeQuantized]]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(expert) for expert in experts)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for token, (chosen, factors) in enumerate(zip(ids.tolist(), weights, strict=True)):
            for number, factor in zip(chosen, factors, strict=True):
                gate, up, down = self.experts[number]
                row = x[token : token + 1]
                y[token] += factor * down(nn.functional.silu(gate(row)) * up(row))[0]
        return y


def fake_quantized_model(directory: Path, checkpoint: Path) -> tuple[nn.Module, dict[str, str]]:
    """transformers' model of a float directory with the tensors of its checkpoint, in float32.

    Returns:
        The model, and the quant types of its quantized linear layers by name.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    return model, load_fake_quantized(model, directory, checkpoint)


def load_fake_quantized(
    model: nn.Module, directory: Path, checkpoint: Path, stored_name: Callable[[str], str] = str
) -> dict[str, str]:
    """Give a float model the tensors of its checkpoint; returns the quant types of its quantized linear layers.

    Args:
        model: changed in place.
        directory: of the float model.
        checkpoint: made from it.
        stored_name: the name in the files of the model's parameter with a name.
    """
    types = json.loads((checkpoint / DESCRIPTION).read_text())
    stored: dict[str, Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        stored |= load_file(file)
    original = load_file(directory / "model.safetensors")
    kinds: dict[str, str] = {}
    state = {stored_name(name): tensor for name, tensor in model.state_dict().items()}
    modules = {stored_name(name): name for name, _ in model.named_modules()}
    for name, tensor in stored.items():
        module, _, suffix = name.rpartition(".")
        if types[name] != "FLOAT":
            if suffix == "weight":
                kinds[module] = types[name]
        elif name in state:
            state[name].copy_(tensor)
        else:  # experts, which transformers holds in another form
            assert torch.equal(tensor, original[name]), name
    experts: dict[str, dict[int, dict[str, FakeQuantized]]] = {}
    for module, kind in kinds.items():
        own = {n.rpartition(".")[2]: t for n, t in stored.items() if n.rpartition(".")[0] == module}
        layer = FakeQuantized(kind, own)
        if ".experts." in module:
            parent, _, number, leaf = module.rsplit(".", 3)
            experts.setdefault(parent, {}).setdefault(int(number), {})[leaf] = layer
        else:
            model.set_submodule(modules[module], layer)
    for parent, members in experts.items():
        leaves = ("w1", "w3", "w2") if "w1" in members[0] else ("gate_proj", "up_proj", "down_proj")
        fakes = [[members[number][leaf] for leaf in leaves] for number in range(len(members))]
        model.set_submodule(f"{parent.replace('block_sparse_moe', 'mlp')}.experts", FakeExperts(fakes))
    return kinds


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """[rows, length, vocabulary] for token ids [rows, length]."""
    return model(ids, use_cache=False).logits


def decided_rows(model: nn.Module, vocabulary: int, rows: int = 2, length: int = 24) -> Tensor:
    """Token ids [rows, length] with which no activation is so near to two codes that its last digits decide.

    Two exact computations can differ by a whole code otherwise.

    Args:
        model: of which the `FakeQuantized` layers are asked.
        vocabulary: number of tokens.
        rows, length: of the result.
    """
    generator, found = torch.Generator().manual_seed(6), []
    layers = [layer for layer in model.modules() if isinstance(layer, FakeQuantized)]
    for _ in range(_ATTEMPTS):
        ids = torch.randint(3, vocabulary, (1, length), generator=generator)
        for layer in layers:
            layer.margins = torch.empty(0)
        logits(model, ids)
        if torch.cat([layer.margins for layer in layers]).min() > _DECIDED:
            found.append(ids)
        if len(found) == rows:
            return torch.cat(found)
    raise AssertionError(f"{len(found)} of {rows} rows found in {_ATTEMPTS} attempts")


def without_numbers(names: Iterable[str]) -> tuple[str, ...]:
    """The same names, in their order, with one name for all experts of a layer."""
    return tuple(dict.fromkeys(name.partition(".experts.")[0] + ".experts" * (".experts." in name) for name in names))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| of logits, each token's shifted to a mean of zero: a softmax is the same."""
    found, expected = found - found.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)
    return ((found - expected).norm() / expected.norm()).item()
