# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints with faults of real ones, each with one property, and what a plain torch model computes from them.

tests/data/cases holds a JSON file for each case, and the tensors of all, stored once. `expected` has a prompt (`ids`),
the log probability of each next token (`lp`) and the likeliest next tokens (`top`), computed by a float32 model with
the same fake quantization; None for a case that must be refused.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import DATA

CASES = DATA / "cases"
NAMES = sorted(file.stem for file in CASES.glob("*.json"))


@cache
def _tensors() -> dict[str, torch.Tensor]:
    return {key: tensor for file in CASES.glob("tensors-*.safetensors") for key, tensor in load_file(file).items()}


def write_case(name: str, directory: Path) -> dict[str, Any] | None:
    """Write a case as a checkpoint directory; returns what is expected of it."""
    case = json.loads((CASES / f"{name}.json").read_text())
    directory.mkdir(parents=True, exist_ok=True)
    for file, names in case["files"].items():
        save_file({name: _tensors()[key].clone() for name, key in names.items()}, directory / file, {"format": "pt"})
    for file, content in (
        ("config.json", case["config"]),
        ("quant_model_description.json", case["description"]),
        (case["index"]["name"], case["index"]["content"]),
    ):
        (directory / file).write_text(json.dumps(content))
    return case["expected"]
