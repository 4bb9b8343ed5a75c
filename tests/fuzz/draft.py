# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in memory that mutations may change, and that can be written to a directory."""

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.cases import write_case
from tests.conftest import DESCRIPTION, MICRO
from tests.mixtures import write_mixture

Pick = Callable[[Sequence[Any]], Any]
"""Chooses one of several values: `random.Random(...).choice`, or a draw of hypothesis."""

MIXTURE = ("W4A4_FLATQUANT_DYNAMIC", "W8A8_DYNAMIC")
BASES = (
    "micro", "n3_glm4", "c1_moe_w4", "c4_moe_mixed", "mixture", "d1_mimo_undesc", "f4_group3d", "a3_m4_qkv_bias",
)  # fmt: skip


@dataclass
class Draft:
    """A checkpoint.

    Attributes:
        files: file name -> tensors by name.
        config, description: of config.json and the description file; text stands for a file that is no JSON object,
            None for one that is absent.
        index: tensor name -> file; None for a checkpoint without an index.
        index_name: of the index file.
        others: further files, by name.
        log: what was changed, in words.
    """

    files: dict[str, dict[str, torch.Tensor]]
    config: dict[str, Any] | str | None
    description: dict[str, Any] | str | None
    index: dict[str, str] | None
    index_name: str
    others: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """Of all tensors in the files."""
        return sorted({name for tensors in self.files.values() for name in tensors})

    def get(self, name: str) -> torch.Tensor:
        """A stored tensor."""
        return next(tensors[name] for tensors in self.files.values() if name in tensors)

    def put(self, name: str, tensor: torch.Tensor, quant_type: str | None = None, file: str | None = None) -> None:
        """Store a tensor, in place of the one of its name; describe it if a type is given."""
        where = file or next((f for f, tensors in self.files.items() if name in tensors), next(iter(self.files)))
        self.files.setdefault(where, {})[name] = tensor.contiguous().clone()
        if self.index is not None:
            self.index[name] = where
        if quant_type is not None and isinstance(self.description, dict):
            self.description[name] = quant_type

    def drop(self, name: str, description: bool = True, files: bool = True, index: bool = True) -> None:
        """Remove a tensor from some of the places that name it."""
        if description and isinstance(self.description, dict):
            self.description.pop(name, None)
        if files:
            for tensors in self.files.values():
                tensors.pop(name, None)
        if index and self.index is not None:
            self.index.pop(name, None)

    def type_of(self, name: str) -> str:
        """How a tensor is described, "" if it is not."""
        found = self.description.get(name) if isinstance(self.description, dict) else None
        return found if isinstance(found, str) else ""

    def modules(self, *, quantized: bool | None = None) -> list[str]:
        """Modules with a stored weight; only those with or without scales if asked."""
        names = set(self.names())
        found = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        return sorted(m for m in found if quantized is None or quantized == (f"{m}.weight_scale" in names))

    def suffixed(self, *suffixes: str) -> list[str]:
        """Names of the stored tensors that end in one of `suffixes`."""
        return [name for name in self.names() if name.rpartition(".")[2] in suffixes]

    def write(self, directory: Path) -> None:
        """Write all files."""
        for file, tensors in self.files.items():
            save_file(tensors, directory / file, {"format": "pt"})
        index = None if self.index is None else {"metadata": {}, "weight_map": self.index}
        for name, content in (
            ("config.json", self.config),
            (DESCRIPTION, self.description),
            (self.index_name, index),
        ):
            if content is not None:
                (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
        for name, data in self.others.items():
            (directory / name).write_bytes(data)


@cache
def _base(name: str) -> Draft:
    with tempfile.TemporaryDirectory() as folder:
        directory = MICRO if name == "micro" else Path(folder)
        if name == "mixture":
            write_mixture(directory, MIXTURE, experts=3)
        elif name != "micro":
            write_case(name, directory)
        index = next(directory.glob("*.index.json"))
        return Draft(
            {file.name: load_file(file) for file in sorted(directory.glob("*.safetensors"))},
            json.loads((directory / "config.json").read_text()),
            json.loads((directory / DESCRIPTION).read_text()),
            json.loads(index.read_text())["weight_map"],
            index.name,
        )


def base(name: str) -> Draft:
    """A fresh copy of one of `BASES`. Its tensors must be replaced, not changed in place."""
    draft = _base(name)
    return Draft(
        {file: dict(tensors) for file, tensors in draft.files.items()},
        copy.deepcopy(draft.config),
        copy.deepcopy(draft.description),
        copy.deepcopy(draft.index),
        draft.index_name,
        log=[name],
    )
