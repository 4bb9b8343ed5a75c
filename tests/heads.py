# SPDX-License-Identifier: Apache-2.0
"""The micro checkpoint with an int8 output head, and what such a head computes."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import DESCRIPTION, INDEX, WEIGHTS


def int8_head(seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a head W8A8_DYNAMIC for the micro checkpoint, by name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "lm_head.weight": torch.randint(-127, 128, (512, 192), dtype=torch.int8, generator=generator),
        "lm_head.weight_scale": torch.rand(512, 1, generator=generator) * 1e-3,
        "lm_head.weight_offset": torch.zeros(512, 1),
    }


def put_head(directory: Path, head: dict[str, torch.Tensor]) -> Path:
    """Write the head into a copy of the micro checkpoint; returns its directory."""
    save_file({**load_file(directory / WEIGHTS), **head}, directory / WEIGHTS, metadata={"format": "pt"})
    for name, entries in ((DESCRIPTION, dict.fromkeys(head, "W8A8_DYNAMIC")), (INDEX, dict.fromkeys(head, WEIGHTS))):
        data = json.loads((directory / name).read_text())
        (data["weight_map"] if name == INDEX else data).update(entries)
        (directory / name).write_text(json.dumps(data))
    return directory


def logits_by_formula(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """In float64: int8 codes of each token, times int8 weights [tokens, features], times both scales."""
    step = x.double().abs().amax(1, keepdim=True) / 127
    return (x.double() / step).round() * step @ (weight.double() * scale.double().reshape(-1, 1)).T
