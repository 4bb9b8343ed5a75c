# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose int4 weights are packed two to a byte, by the tests' own packing."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import DESCRIPTION
from tests.packing import packed


def write_packed(source: Path, directory: Path) -> None:
    """A copy of a checkpoint with packed W4A4 weights."""
    shutil.copytree(source, directory)
    types = json.loads((source / DESCRIPTION).read_text())
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(".weight") and types.get(name, "").startswith("W4A4"):
                tensors[name] = torch.from_numpy(packed(tensor.numpy()))
        save_file(tensors, file, {"format": "pt"})
