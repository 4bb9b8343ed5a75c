# SPDX-License-Identifier: Apache-2.0
"""The micro checkpoint with its linear layers in other quant types, rounded to nearest."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.conftest import DESCRIPTION, INDEX, MICRO, WEIGHTS
from vllm_w4a4_plugin.checkpoint import CheckpointReader

FLATQUANT, DYNAMIC, W8A8 = "W4A4_FLATQUANT_DYNAMIC", "W4A4_DYNAMIC", "W8A8_DYNAMIC"
LINEARS = {
    **{f"self_attn.{name}_proj": FLATQUANT for name in "qkvo"},
    **{f"mlp.{name}_proj": FLATQUANT for name in ("gate", "up", "down")},
}
ALL_W4A4: Mapping[str, str] = LINEARS
ALL_DYNAMIC: Mapping[str, str] = {name: W8A8 if name.endswith("down_proj") else DYNAMIC for name in LINEARS}
LEFT = 16
CLIP = 0.95


def requantize(directory: Path, kinds: Mapping[str, str]) -> Path:
    """Write the checkpoint with each linear of a layer, by its name in it, in the type that `kinds` gives it."""
    reader = CheckpointReader(MICRO)
    tensors = {name: reader.load(name) for name in reader.tensors if not name.startswith("model.layers.")}
    types = dict.fromkeys(tensors, "FLOAT")
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name in (n for n in reader.tensors if n.startswith(prefix) and "norm" in n):
            tensors[name], types[name] = reader.load(name), "FLOAT"
        for name, kind in kinds.items():
            for suffix, tensor in _stored(_weight(reader, prefix + name), kind).items():
                tensors[f"{prefix}{name}.{suffix}"], types[f"{prefix}{name}.{suffix}"] = tensor, kind
    shutil.copytree(MICRO, directory, dirs_exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, WEIGHTS)}))
    (directory / DESCRIPTION).write_text(json.dumps({"version": "1.0.0", **types}))
    return directory


def _weight(reader: CheckpointReader, name: str) -> torch.Tensor:
    """What the layer's codes stand for, in the basis of its transformed inputs if it has a transform."""
    weight = reader.load(f"{name}.weight").float()
    scale = f"{name}.weight_scale"
    return weight * reader.load(scale).float() if scale in reader.tensors else weight


def _stored(weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    extra = {}
    if kind == FLATQUANT:
        generator = torch.Generator().manual_seed(0)  # of all layers the same, as fused ones must have it
        sizes = (LEFT, weight.shape[1] // LEFT)
        left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in sizes)
        weight = weight @ torch.kron(left, right)
        extra = {"left_trans": left, "right_trans": right, "clip_ratio": torch.tensor([CLIP])}
    largest = 127 if kind == W8A8 else 7
    scale = weight.abs().amax(1, keepdim=True) / largest
    codes = (weight / scale).round().to(torch.int8)
    stored = {"weight": codes, "weight_scale": scale, "weight_offset": torch.zeros_like(scale), **extra}
    return {name: tensor.contiguous() for name, tensor in stored.items()}
