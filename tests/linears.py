# SPDX-License-Identifier: Apache-2.0
"""Made-up linears: written as a checkpoint, opened by a quantization configuration, loaded into a layer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import save_file

from tests.conftest import DESCRIPTION, PACKED

Config = TypeVar("Config", bound=Any)


class StoredLinear(Protocol):
    """One linear of a checkpoint: its quant type and its tensors by suffix, as `weight`."""

    kind: str

    def tensors(self) -> dict[str, torch.Tensor]: ...


def open_config(config: Config, directory: Path, linears: Mapping[str, StoredLinear]) -> Config:
    """Write the linears, by full module name, as a checkpoint into `directory` and open it as vLLM does."""
    tensors, kinds = {}, {}
    for name, linear in linears.items():
        for suffix, tensor in linear.tensors().items():
            tensors[f"{name}.{suffix}"] = tensor
            kinds[f"{name}.{suffix}"] = "FLOAT" if suffix == "bias" else linear.kind
    save_file(tensors, directory / "model.safetensors")
    (directory / DESCRIPTION).write_text(json.dumps({"version": "1.0.0", **kinds}))
    (directory / "config.json").write_text("{}")
    config.maybe_update_config(str(directory))
    config.packed_modules_mapping = PACKED
    return config


def load(layer: Any, linears: Mapping[Any, StoredLinear]) -> Any:
    """What a model's load_weights does, then what vLLM's loader does after it; shard None: the layer is not fused."""
    for shard, linear in linears.items():
        for name, tensor in linear.tensors().items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, of tensors of the same shape and dtype."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()
