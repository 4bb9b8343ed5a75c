# SPDX-License-Identifier: Apache-2.0
"""The table of architectures against the models that transformers makes of the same config.json."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_w4a4_plugin.checkpoint.architectures import ARCHITECTURES, Decoder, architecture_of

SIZES = {"hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 2, "vocab_size": 64, "moe_intermediate_size": 48, "num_experts": 4,
         "shared_expert_intermediate_size": 40,
         "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0}  # fmt: skip
CHANGES: tuple[dict[str, Any], ...] = (
    {}, {"head_dim": 32}, {"attention_bias": True}, {"attention_bias": False}, {"mlp_bias": True},
    {"tie_word_embeddings": True}, {"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}, {"num_key_value_heads": 6},
)  # fmt: skip


def modules_of_transformers(config: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Module name -> shape of its weight and whether it has a bias; experts one by one, as checkpoints store them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    found: dict[str, tuple[tuple[int, ...], bool]] = {}
    for name, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter):
            found[name] = (tuple(weight.shape), getattr(module, "bias", None) is not None)
        if isinstance(fused := getattr(module, "gate_up_proj", None), torch.nn.Parameter):
            for number in range(len(fused)):
                half = (fused.shape[1] // 2, fused.shape[2])
                found |= {f"{name}.{number}.{leaf}": (half, False) for leaf in ("gate_proj", "up_proj")}
                found[f"{name}.{number}.down_proj"] = (tuple(module.down_proj.shape[1:]), False)  # type: ignore[union-attr,index,arg-type]
    if model.config.tie_word_embeddings:
        found.pop("lm_head")
    if config["model_type"] == "mixtral":  # whose files have names of their own
        leaves = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        found = {".".join(leaves.get(part, part) for part in name.split(".")): found[name] for name in found}
    return found


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "MiMoForCausalLM"])
def test_modules(name: str, changes: dict[str, Any]) -> None:
    entry = ARCHITECTURES[name]
    config = {"architectures": [name], "model_type": entry.model_types[0], **SIZES, **changes}
    if entry.experts is None:
        config = {key: value for key, value in config.items() if "expert" not in key and "moe" not in key}
    if name in ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM"):
        config.pop("head_dim", None)  # transformers takes one that vLLM does not
    if name == "MistralForCausalLM":
        config.pop("attention_bias", None)  # likewise the other way round
        config.pop("mlp_bias", None)
    if name == "Qwen3MoeForCausalLM":
        config.setdefault("head_dim", 16)
    stored = {"model.layers.0.mlp.gate_up_proj", "model.layers.1.mlp.gate_up_proj"} if name.startswith("Glm4") else ()
    found = Decoder(config).modules(set(stored))
    assert {name: (module.shape, module.bias) for name, module in found.items()} == modules_of_transformers(config)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "MiMoForCausalLM"])
def test_absent_keys_mean_what_they_mean_to_transformers(name: str) -> None:
    entry = ARCHITECTURES[name]
    reference = AutoConfig.for_model(entry.model_types[0])
    decoder = Decoder({"architectures": [name], "model_type": reference.model_type, "num_experts": 8,
                       "moe_intermediate_size": 8,
                       **{key: getattr(reference, key) for key in
                          ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                           "vocab_size")}})  # fmt: skip
    assert decoder.kv_heads == (reference.num_key_value_heads or reference.num_attention_heads)
    assert decoder.head_dim == (
        getattr(reference, "head_dim", None) or reference.hidden_size // reference.num_attention_heads
    )
    assert decoder.tied == reference.tie_word_embeddings


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
        ({"architectures": ["Other", "LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": ["Qwen3ForSequenceClassification"], "model_type": "qwen3"}, ""),
        ({"model_type": "qwen3"}, "Qwen3ForCausalLM"),
        ({"architectures": [], "model_type": "qwen2"}, "Qwen2ForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "own", "auto_map": {"AutoConfig": "x"}}, ""),
        ({"architectures": "LlamaForCausalLM"}, ""),
        ({}, ""),
    ],
)
def test_architecture_of(config: dict[str, Any], expected: str) -> None:
    assert architecture_of(config) == expected
