# SPDX-License-Identifier: Apache-2.0
"""Mutations of names, places, dtypes and shapes."""

import re

import torch

from .draft import Draft, Pick

TYPES = (
    "FLOAT", "W8A8_DYNAMIC", "W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC", "W8A8", "W8A8_FLATQUANT_DYNAMIC", "W5A5", "",
)  # fmt: skip
SUFFIXES = (
    "weight", "weight_scale", "weight_offset", "left_trans", "right_trans", "clip_ratio", "bias", "quant_bias",
    "deq_scale", "heads_rotation", "kronecker_rotation_m", "inv_freq", "weight_g", "scale",
)  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.uint8)


def drop_tensor(draft: Draft, pick: Pick) -> None:
    name = pick(draft.names())
    places = pick(
        (
            {"description": True, "files": True, "index": True},
            {"description": False},
            {"files": False, "index": False},
            {"description": False, "files": False},
            {"description": False, "index": False},
        )
    )
    draft.log.append(f"drop {name} {places}")
    draft.drop(name, **places)


def drop_module(draft: Draft, pick: Pick) -> None:
    module = pick(draft.modules())
    described = pick((True, False))
    draft.log.append(f"drop module {module} description={described}")
    for name in [n for n in draft.names() if n.rpartition(".")[0] == module]:
        draft.drop(name, description=described)


def rename_tensor(draft: Draft, pick: Pick) -> None:
    name = pick(draft.names())
    new = _other_name(name, pick)
    described = pick((True, False))
    draft.log.append(f"rename {name} -> {new} description={described}")
    tensor, kind = draft.get(name), draft.type_of(name)
    draft.drop(name, description=described)
    draft.put(new, tensor, kind if described and kind else None)


def rename_module(draft: Draft, pick: Pick) -> None:
    module = pick(draft.modules())
    new = _other_name(f"{module}.weight", pick).rpartition(".")[0]
    draft.log.append(f"rename module {module} -> {new}")
    for name in [n for n in draft.names() if n.rpartition(".")[0] == module]:
        tensor, kind = draft.get(name), draft.type_of(name)
        draft.drop(name)
        draft.put(f"{new}.{name.rpartition('.')[2]}", tensor, kind or None)


def wrap_all(draft: Draft, pick: Pick) -> None:
    old, new = pick((("model.", "model.language_model."), ("model.", "language_model.model."), ("", "module.")))
    draft.log.append(f"all names {old!r} -> {new!r}")
    for name in draft.names():
        if name.startswith(old):
            tensor, kind = draft.get(name), draft.type_of(name)
            draft.drop(name)
            draft.put(new + name.removeprefix(old), tensor, kind or None)


def duplicate_tensor(draft: Draft, pick: Pick) -> None:
    name = pick(draft.names())
    if pick((True, False)):
        draft.log.append(f"{name} in a second file too")
        draft.files.setdefault("second.safetensors", {})[name] = draft.get(name)
        if draft.index is not None and pick((True, False)):
            draft.index["second.tensor.weight"] = "second.safetensors"
        return
    new = _other_name(name, pick)
    kind = pick((draft.type_of(name) or None, None, "FLOAT"))
    draft.log.append(f"copy {name} -> {new} as {kind}")
    draft.put(new, draft.get(name), kind)


def add_tensor(draft: Draft, pick: Pick) -> None:
    module = pick([*draft.modules(), "model", "model.layers.0.self_attn", "model.layers.0.self_attn.rotary_emb", "x"])
    name = f"{module}.{pick(SUFFIXES)}"
    shape = pick(((), (1,), (4, 4), (192,), (64,)))
    draft.log.append(f"add {name} {shape}")
    draft.put(name, torch.zeros(shape).to(pick(DTYPES)), pick((None, "FLOAT", *TYPES)))


def add_layer(draft: Draft, pick: Pick) -> None:
    shift = pick((1, 2, 9))
    suffix = pick(("", "weight", "input_layernorm.weight"))
    draft.log.append(f"copy of layer 1 as {1 + shift}, only {suffix!r}")
    for name in draft.names():
        if ".layers.1." in name and name.endswith(suffix):
            draft.put(name.replace(".layers.1.", f".layers.{1 + shift}."), draft.get(name), draft.type_of(name) or None)
    if isinstance(draft.config, dict) and pick((True, False)):
        draft.config["num_nextn_predict_layers"] = shift


def add_useless(draft: Draft, pick: Pick) -> None:
    name = pick(
        (
            "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "mtp.fc.weight",
            "model.mtp_layers.0.input_proj.weight", "model.mtp.norm.weight", "mtp.layers.0.mlp.up_proj.weight",
            "model.mtp_block.weight", "rotary_emb.cos_cached", "model.layers.0.mtp.weight",
        )
    )  # fmt: skip
    draft.log.append(f"add useless {name}")
    draft.put(name, torch.zeros(pick(((32,), (4, 4)))), pick((None, "FLOAT")))


def change_dtype(draft: Draft, pick: Pick) -> None:
    name, dtype = pick(draft.names()), pick(DTYPES)
    draft.log.append(f"{name} to {dtype}")
    draft.put(name, draft.get(name).to(dtype))


def change_small_dtype(draft: Draft, pick: Pick) -> None:
    name = pick(draft.suffixed("weight_scale", "weight_offset", "clip_ratio", "bias", "left_trans") or draft.names())
    dtype = pick((torch.float64, torch.bfloat16, torch.float16, torch.int8))
    draft.log.append(f"{name} to {dtype}")
    draft.put(name, draft.get(name).to(dtype))


def change_shape(draft: Draft, pick: Pick) -> None:
    name = pick(draft.names())
    tensor = draft.get(name)
    ways = {
        "flat": lambda t: t.reshape(-1),
        "column": lambda t: t.reshape(-1, 1),
        "row": lambda t: t.reshape(1, -1),
        "one more dimension": lambda t: t.unsqueeze(-1),
        "first dimension": lambda t: t.unsqueeze(0),
        "transposed": lambda t: t.t() if t.dim() == 2 else t,
        "one less": lambda t: t[:-1] if t.dim() else t,
        "half": lambda t: t[: len(t) // 2] if t.dim() else t,
        "twice": lambda t: torch.cat([t, t]) if t.dim() else t.repeat(2),
        "one value": lambda t: t.reshape(-1)[:1],
        "scalar": lambda t: t.reshape(-1)[0],
        "empty": lambda t: t[:0] if t.dim() else t,
        "narrow": lambda t: t[:, : t.shape[1] // 2] if t.dim() == 2 else t,
        "wide": lambda t: torch.cat([t, t], 1) if t.dim() == 2 else t,
    }
    way = pick(sorted(ways))
    draft.log.append(f"{name} {way}")
    if tensor.numel():
        draft.put(name, ways[way](tensor))


def respell(draft: Draft, pick: Pick) -> None:
    """Harmless spellings."""
    suffix, shape = pick(
        (("clip_ratio", (1, 1)), ("clip_ratio", ()), ("weight_offset", (-1,)), ("weight_scale", (-1,)),
         ("weight_scale", (-1, 1, 1)), ("weight_offset", (-1, 1, 1)))
    )  # fmt: skip
    names = draft.suffixed(suffix)
    if not names:
        return
    names = names if pick((True, False)) else [pick(names)]
    draft.log.append(f"{names[:2]} as {shape}")
    for name in names:
        tensor = draft.get(name)
        if tensor.numel() == 1 or (tensor.dim() and tensor.numel() == tensor.shape[0]) or len(shape) < 3:
            draft.put(name, tensor.reshape(shape) if tensor.numel() == 1 or len(shape) != 0 else tensor)


def fuse(draft: Draft, pick: Pick) -> None:
    """Store q, k and v, or gate and up, as one matrix."""
    parent, whole, leaves = pick(
        [
            (f"model.layers.{layer}.{part}", whole, leaves)
            for layer in (0, 1)
            for part, whole, leaves in (
                ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
                ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
            )
        ]
    )
    names = set(draft.names())
    draft.log.append(f"fuse {parent}.{whole}")
    for name in sorted(n for n in names if n.startswith(f"{parent}.{leaves[0]}.")):
        suffix = name.rpartition(".")[2]
        parts = [f"{parent}.{leaf}.{suffix}" for leaf in leaves]
        if names.issuperset(parts):
            tensors = [draft.get(part) for part in parts]
            kind = draft.type_of(parts[0])
            has_rows = suffix in ("weight", "weight_scale", "weight_offset", "bias")
            if has_rows and (len({t.shape[1:] for t in tensors}) != 1 or not all(t.dim() for t in tensors)):
                continue  # another mutation has been here
            for part in parts:
                draft.drop(part)
            draft.put(f"{parent}.{whole}.{suffix}", torch.cat(tensors) if has_rows else tensors[0], kind or None)


def _other_name(name: str, pick: Pick) -> str:
    head, _, suffix = name.rpartition(".")
    parent, _, leaf = head.rpartition(".")
    number = re.search(r"layers\.(\d+)", name)
    choices = [
        f"{name}x", f"x.{name}", f"model.{name}", f"language_model.{name}", f"{head}.{pick(SUFFIXES)}",
        f"{parent}.{leaf}x.{suffix}", f"{parent}.down_proj.{suffix}", f"{parent}.q_proj.{suffix}",
        name.replace("model.", "model.language_model.", 1), name.replace("_proj", "_linear"),
        name.replace("self_attn", "attention"), name.replace("mlp", "mlp.experts.0"), suffix,
    ]  # fmt: skip
    if number:
        choices.append(name.replace(number[0], "layers.7"))
        choices.append(name.replace(number[0], f"layers.{1 - int(number[1]) % 2}"))
    return pick(choices)


STRUCTURE = (
    drop_tensor, drop_module, rename_tensor, rename_module, wrap_all, duplicate_tensor, add_tensor, add_layer,
    add_useless, change_dtype, change_small_dtype, change_shape, respell, fuse,
)  # fmt: skip
