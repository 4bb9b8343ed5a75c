# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, by the names that vLLM uses."""

import re
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

from .accounting import complete_description, useless_reason
from .description import QuantDescription
from .model_config import text_config
from .reader import CheckpointReader, TensorInfo
from .types import WEIGHT

_MTP_LAYER = re.compile(r"^model\.mtp_(?:layers|block)\.(\d+)\.")


class Inventory:
    """What a checkpoint holds, grouped by module once.

    Args:
        description: with tensor names as vLLM spells them.
        tensors: the headers by tensor name as vLLM spells it; empty where there are no weights yet. Their own names
            are those in the files.
        stored_names: tensor name as vLLM spells it -> name in the files, where the two differ.
        config: the decoded config.json, {} where there is none.

    Attributes:
        assumed_float: tensors without an entry in the description file, which are taken for FLOAT.
    """

    def __init__(
        self,
        description: QuantDescription,
        tensors: Mapping[str, TensorInfo] | None = None,
        stored_names: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.tensors, self._stored_names, self.config = tensors or {}, stored_names or {}, config or {}
        self.description, self.assumed_float = complete_description(description, self.tensors)

    @classmethod
    def of(cls, reader: CheckpointReader) -> "Inventory":
        """That of a directory with weights."""
        return cls(reader.description, reader.tensors, config=reader.config if reader.has_config else {})

    def renamed(
        self, rename: Callable[[dict[str, Any]], dict[str, Any]], description: QuantDescription | None = None
    ) -> "Inventory":
        """The same with tensor names mapped by `rename`, vLLM's `WeightsMapper.apply_dict`.

        Args:
            rename: returns a dict with other keys and the same values.
            description: the description with its names already mapped to those of vLLM, if the caller has done that.
        """
        names = {**self.description.tensors, **self.tensors}
        return Inventory(
            description or self.description.renamed(rename),
            rename(dict(self.tensors)),
            rename({name: self._stored_names.get(name, name) for name in names}),
            self.config,
        )

    def with_numbered_mtp_layers(self) -> "Inventory":
        """The same with layers for multi-token prediction numbered on from the last layer, as vLLM's modules are.

        MiMo's and Ernie's files count them from 0, in `model.mtp_layers` and `model.mtp_block`.
        """
        layers = text_config(self.config).get("num_hidden_layers")
        if not isinstance(layers, int):
            return self

        def numbered(name: str) -> str:
            found = _MTP_LAYER.sub(lambda match: f"model.layers.{layers + int(match[1])}.", name)
            return found if self.is_useless(found) else name  # config.json counts it as such a layer

        return self.renamed(lambda entries: {numbered(name): value for name, value in entries.items()})

    def without(self, stored: Collection[str]) -> "Inventory":
        """The same without some tensors, given by their names in the files."""
        tensors = {name: info for name, info in self.tensors.items() if info.name not in stored}
        return Inventory(self.description, tensors, self._stored_names, self.config)

    def stored_name(self, module: str) -> str:
        """A module's name in the files."""
        weight = f"{module}.{WEIGHT}"
        return self._stored_names.get(weight, weight).removesuffix(f".{WEIGHT}")

    def is_useless(self, name: str) -> bool:
        """Whether the model is served without the tensor or module `name`."""
        return bool(useless_reason(name, self.config))

    @property
    def modules(self) -> Collection[str]:
        """Names of all modules that have tensors."""
        return self._modules.keys()

    def module(self, name: str) -> Mapping[str, TensorInfo]:
        """Headers of a module's tensors by the last part of their names."""
        return self._modules.get(name, {})

    @cached_property
    def _modules(self) -> dict[str, dict[str, TensorInfo]]:
        modules: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            module, _, suffix = name.rpartition(".")
            modules.setdefault(module, {})[suffix] = info
        return modules
