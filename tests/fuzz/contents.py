# SPDX-License-Identifier: Apache-2.0
"""Mutations of values, of types, of config.json and of the files themselves."""

from typing import Any

import torch

from tests.conftest import DESCRIPTION

from .draft import Draft, Pick
from .structure import TYPES

NAN, INF = float("nan"), float("inf")


def spoil_value(draft: Draft, pick: Pick) -> None:
    name = pick(draft.names())
    tensor = draft.get(name).clone()
    value = pick((NAN, INF, -INF) if tensor.is_floating_point() else (8, -9, 100, -128))
    draft.log.append(f"{name}: one value {value}")
    if tensor.numel():
        tensor.view(-1)[pick((0, tensor.numel() // 2, tensor.numel() - 1))] = value
        draft.put(name, tensor)


def spoil_small(draft: Draft, pick: Pick) -> None:
    """Values that matter, in the tensors that hold few of them."""
    names = draft.suffixed("weight_scale", "weight_offset", "clip_ratio", "bias", "left_trans", "right_trans")
    name = pick(names or draft.names())
    value = pick((NAN, INF, 0.0, -1.0, 1.5, 1.0, 1e-30, 1e30))
    tensor = draft.get(name).clone()
    draft.log.append(f"{name}: {value}")
    if tensor.numel() and (tensor.is_floating_point() or value == int(value if abs(value) < 9 else 0.5)):
        tensor.view(-1)[-1] = value
        draft.put(name, tensor)


def differ_in_a_fused_layer(draft: Draft, pick: Pick) -> None:
    names = draft.suffixed("left_trans", "right_trans", "clip_ratio")
    if not names:
        return
    name = pick(names)
    factor = pick((1 + 1e-7, 1 + 5e-6, 1 + 5e-4, 1 - 9e-4, 1 - 2e-3, 0.5))
    dtype = pick((torch.float32, torch.float64, torch.bfloat16))
    draft.log.append(f"{name} times {factor} as {dtype}")
    draft.put(name, (draft.get(name).double() * factor).to(dtype))


def tie(draft: Draft, pick: Pick) -> None:
    if not isinstance(draft.config, dict):
        return
    draft.config["tie_word_embeddings"] = True
    what = pick(("equal head", "other head", "no head", "wide head", "head in float64"))
    draft.log.append(f"tied, {what}")
    name, kind = "lm_head.weight", draft.type_of("lm_head.weight")
    embedding = [n for n in draft.names() if n.endswith("embed_tokens.weight")]
    if what == "no head":
        draft.drop(name)
    elif what == "equal head" and embedding:
        draft.put(name, draft.get(embedding[0]), kind or None)
    elif what == "wide head" and embedding:
        draft.put(name, torch.cat([draft.get(embedding[0])] * 2), kind or None)
    elif what == "head in float64" and embedding:
        draft.put(name, draft.get(embedding[0]).double(), kind or None)


def add_bias(draft: Draft, pick: Pick) -> None:
    module = pick(draft.modules())
    weight = draft.get(f"{module}.weight")
    size = weight.shape[0] if weight.dim() else 1
    shape = pick(((size,), (size,), (size,), (size, 1), (size + 1,), (1,)))
    bias = pick((torch.zeros, torch.ones))(shape, dtype=pick((torch.float32, torch.bfloat16, torch.int32)))
    described = pick((None, "FLOAT", "W8A8_DYNAMIC"))
    parent, _, leaf = module.rpartition(".")
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    others = next((group for group in groups if leaf in group), (leaf,)) if pick((True, False)) else (leaf,)
    draft.log.append(f"bias {list(bias.shape)} {bias.dtype} {described} for {parent} {others}")
    for other in others:
        name = f"{parent}.{other}" if parent else other
        if other == leaf or f"{name}.weight" not in draft.names():
            draft.put(f"{name}.bias", bias, described)
        else:
            draft.put(f"{name}.bias", torch.ones(len(draft.get(f"{name}.weight"))), described)


def describe_otherwise(draft: Draft, pick: Pick) -> None:
    if not isinstance(draft.description, dict):
        return
    whole_module = pick((True, False))
    name = pick(sorted(key for key in draft.description if "." in key))
    kind = pick((*TYPES, None, 4, {"type": "FLOAT"}))
    draft.log.append(f"{name}{' and its module' if whole_module else ''} described as {kind!r}")
    module = name.rpartition(".")[0]
    for key in list(draft.description):
        if key == name or (whole_module and key.rpartition(".")[0] == module):
            draft.description[key] = kind


def top_level_key(draft: Draft, pick: Pick) -> None:
    if not isinstance(draft.description, dict):
        return
    key, value = pick(
        (
            ("self_attn.quant_type", "W4A4_FLATQUANT_DYNAMIC"), ("model.layers.0.quant_type", "FLOAT"),
            ("model.layers.0.self_attn.q_proj.quant_type", "W8A8"), ("something", {"a": [1]}), ("version", "9.0"),
            ("version", 2), ("group_size", 256), ("group_size", None), ("group_size", "x"), ("group_size", 0),
            ("kv_quant_type", "C8"), ("kv_cache_type", "FLOAT"), ("fa_quant_type", "FAKQuant"), ("metadata", 3),
            ("metadata", {"quarot": {"heads_rotation": {}}}), ("optional", {"quarot": {"global_rotation": 1}}),
            ("optional", None), ("model_quant_type", "W4A4_DYNAMIC"), ("metadata", {"quarot": 5}),
        )
    )  # fmt: skip
    draft.log.append(f"description {key} = {value!r}")
    draft.description[key] = value


def without_transform(draft: Draft, pick: Pick) -> None:
    """A FlatQuant layer described, and perhaps stored, as a layer without a transform."""
    module = pick([m for m in draft.modules() if f"{m}.clip_ratio" in draft.names()] or draft.modules())
    draft.log.append(f"{module} as W4A4_DYNAMIC")
    for suffix in ("left_trans", "right_trans", "clip_ratio"):
        if pick((True, True, True, False)):
            draft.drop(f"{module}.{suffix}")
    for name in draft.names():
        if name.rpartition(".")[0] == module and draft.type_of(name):
            draft.put(name, draft.get(name), "W4A4_DYNAMIC")


def lone_factor(draft: Draft, pick: Pick) -> None:
    suffix = pick(("left_trans", "right_trans"))
    names = draft.suffixed(suffix)
    if not names:
        return
    parent = pick(names).rsplit(".", 2)[0]
    whole = pick((True, False))
    draft.log.append(f"{parent}: no {suffix}, {'all' if whole else 'one'} of its layers")
    for name in [n for n in names if n.startswith(f"{parent}.")][: None if whole else 1]:
        draft.drop(name)


def regroup(draft: Draft, pick: Pick) -> None:
    """Scales and offsets for groups of inputs."""
    groups = pick((2, 4, 3, 48, 64, 192, 5, 0))
    modules = draft.modules(quantized=True) or draft.modules()
    parent = pick(modules).rpartition(".")[0]
    chosen = [m for m in modules if m.startswith(f"{parent}.")] if pick((True, False)) else [pick(modules)]
    suffixes = pick((("weight_scale", "weight_offset"), ("weight_scale",)))
    draft.log.append(f"{chosen} with {groups} groups in {suffixes}")
    for module in chosen:
        for suffix in suffixes:
            name = f"{module}.{suffix}"
            if name in draft.names() and (tensor := draft.get(name)).numel():
                rows = tensor.reshape(len(tensor), -1)[:, :1] if tensor.dim() else tensor.reshape(1, 1)
                draft.put(name, rows.repeat(1, groups))


def change_config(draft: Draft, pick: Pick) -> None:
    if not isinstance(draft.config, dict):
        return
    changes: list[tuple[str, Any]] = [
        *(("hidden_size", value) for value in (96, 256, 384, 0, "192", None)),
        *(("num_attention_heads", value) for value in (1, 2, 3, 8, 0)),
        *(("num_key_value_heads", value) for value in (1, 3, 4, 8, 0, None)),
        *(("head_dim", value) for value in (32, 48, 128, None, 0)),
        *(("num_hidden_layers", value) for value in (1, 3, 0, None)),
        *(("vocab_size", value) for value in (256, 500, 512, 600, None)),
        *(("intermediate_size", value) for value in (192, 768, None)),
        *(("tie_word_embeddings", value) for value in (True, False, None)),
        *(("quantization_config", value) for value in ({"quant_method": "fp8"}, {"quant_method": "ascend"}, {}, None)),
        *(("model_type", value) for value in ("llama", "qwen2", "qwen3", "mistral", "foo", None)),
        *(("architectures", value) for value in (["LlamaForCausalLM"], ["Qwen2ForCausalLM"], ["Foo"], [], None)),
        ("attention_bias", True), ("attention_bias", False), ("mlp_bias", True), ("num_nextn_predict_layers", 1),
        ("mlp_only_layers", []), ("mlp_only_layers", [0, 1]), ("mlp_only_layers", [1]), ("decoder_sparse_step", 2),
        ("num_experts", 8), ("num_local_experts", 3), ("moe_intermediate_size", 64), ("text_config", {}),
        ("torch_dtype", "float16"), ("quantize", "other"), ("new_key", {"x": 1}),
    ]  # fmt: skip
    key, value = pick(changes)
    if value is None and pick((True, False)):
        draft.log.append(f"config without {key}")
        draft.config.pop(key, None)
        return
    draft.log.append(f"config {key} = {value!r}")
    draft.config[key] = value


def change_files(draft: Draft, pick: Pick) -> None:
    way = pick(
        (
            "second index", "no index", "stray file", "empty stray file", "index entry", "rotary index entry",
            "index to a missing file", "index outside", "split", "truncated file", "no config", "broken description",
            "no description", "bin file", "index names all but one", "weight map is a list", "stray text",
        )
    )  # fmt: skip
    draft.log.append(way)
    first = next(iter(draft.files))
    if way == "second index":
        draft.others["model.safetensors.index.json"] = b'{"weight_map": {}}'
    elif way == "no index":
        draft.index = None
    elif way in ("stray file", "empty stray file"):
        name = pick(draft.names())
        draft.files["model-00001-of-00001.safetensors"] = {} if "empty" in way else {name: draft.get(name)}
    elif way.endswith("index entry") and draft.index is not None:
        draft.index["model.rotary_emb.inv_freq" if "rotary" in way else "model.extra.weight"] = first
    elif way == "index to a missing file" and draft.index is not None:
        draft.index["lm_head.weight"] = "other.safetensors"
    elif way == "index outside" and draft.index is not None:
        draft.index["lm_head.weight"] = "../other.safetensors"
    elif way == "split":
        names = draft.names()
        for name in names[: len(names) // 2]:
            tensor = draft.get(name)
            draft.drop(name, description=False)
            draft.put(name, tensor, file="another.safetensors")
    elif way == "truncated file":
        draft.others[first] = b"\x10\x00\x00\x00\x00\x00\x00\x00{}"
    elif way == "no config":
        draft.config = None
    elif way == "broken description":
        draft.description = pick(('{"a": ', "[1]", "{}", '"x"'))
    elif way == "no description":
        draft.description = None
    elif way == "bin file":
        draft.others["pytorch_model.bin"] = b"x"
    elif way == "index names all but one" and draft.index is not None:
        draft.index.pop(pick(draft.names()), None)
    elif way == "weight map is a list":
        draft.others[draft.index_name] = b'{"weight_map": []}'
    elif way == "stray text":
        draft.others["README.md"] = b"hello"
        draft.others[f"{DESCRIPTION}.bak"] = b"{"


CONTENTS = (
    spoil_value, spoil_small, differ_in_a_fused_layer, tie, add_bias, describe_otherwise, top_level_key,
    without_transform, lone_factor, regroup, change_config, change_config, change_files,
)  # fmt: skip
