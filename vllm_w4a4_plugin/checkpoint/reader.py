# SPDX-License-Identifier: Apache-2.0
"""The safetensors files of a checkpoint directory: names, dtypes and shapes from the headers, tensors on demand."""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vllm_w4a4_plugin.constants import INDEX_SUFFIX, SAVED_STATE_FILE

from .description import QuantDescription, check_name, load_description, read_json_object, unreadable
from .errors import CheckpointError

if TYPE_CHECKING:
    import torch


ROTARY_SUFFIXES = (
    "rotary_emb.inv_freq",
    "rotary_pos_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)


def is_rotary(name: str) -> bool:
    """Whether a tensor is a table of rotary positions; vLLM computes them and needs none."""
    return name.endswith(ROTARY_SUFFIXES)


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor.

    Attributes:
        name: tensor name.
        file: name of the shard that holds it.
        dtype: safetensors' spelling: "I8", "F32", "BF16", ...
        shape: as stored.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return prod(self.shape) * int(re.sub(r"\D", "", self.dtype.split("_")[0]) or 8) // 8


class CheckpointReader:
    """A checkpoint directory.

    Args:
        directory: holds the index (`*.safetensors.index.json`) and its shards, or shards alone.

    Raises:
        CheckpointError: no such directory, no weights, a shard is missing, unreadable or truncated, or the index
            points outside the directory or at tensors that its shards do not hold.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._open: tuple[str, Any] | None = None
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: not a directory. Give the directory that holds config.json.")

    @cached_property
    def description(self) -> QuantDescription:
        """The parsed description file."""
        return load_description(self.directory)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`, decoded."""
        return read_json_object(self.directory / "config.json")

    @property
    def has_config(self) -> bool:
        """Whether there is a config.json, or something else of this name, which `config` then refuses."""
        return os.path.lexists(self.directory / "config.json")

    @cached_property
    def has_weights(self) -> bool:
        """Whether there is an index or a safetensors file."""
        return self.index_file is not None or any(self.directory.glob("*.safetensors"))

    @cached_property
    def index_file(self) -> Path | None:
        """The one index of the directory, None where there is none."""
        found = sorted(self.directory.glob(f"*{INDEX_SUFFIX}"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise CheckpointError(
                f"{self.directory}: expected one *{INDEX_SUFFIX}, found {names}. "
                "Remove the index (and its shards) that does not belong to this checkpoint."
            )
        return found[0] if found else None

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the checkpoint, by name, from the headers of all shards."""
        if (self.directory / SAVED_STATE_FILE).exists():
            raise CheckpointError(
                f"{self.directory / SAVED_STATE_FILE}: these weights are the parameters of ranks, not a checkpoint. "
                "They can be served with --load-format sharded_state; for anything else use the checkpoint from which "
                "they were saved."
            )
        weight_map = self._weight_map()
        shards = self._indexed_shards(weight_map) if self.index_file else self._loose_shards()
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for info in self._read_header(shard):
                if info.name in tensors:
                    raise CheckpointError(
                        f"{self.directory}: tensor {info.name} is in both {tensors[info.name].file} and {shard}. "
                        "Keep the shards of one checkpoint only."
                    )
                tensors[info.name] = info
        for name, shard in weight_map.items():
            if (name in tensors and tensors[name].file != shard) or (name not in tensors and not is_rotary(name)):
                raise CheckpointError(
                    f"{self.index_file}: says that {shard} holds tensor {name}, but it does not. "
                    "Index and shards come from different runs; copy the whole directory again."
                )
        return tensors

    def load(self, name: str) -> "torch.Tensor":
        """Read one tensor into memory.

        Raises:
            CheckpointError: torch is not installed; everything else here does without it.
        """
        info = self.tensors[name]
        try:
            return self._opened(info.file).get_tensor(name)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise CheckpointError(
                f"{self.directory / info.file}: reading the values of tensor {name} needs torch, which "
                f"{sys.executable} cannot import. Install vLLM or torch there. "
                "`vllm-w4a4 inspect` and `doctor` need neither."
            ) from None

    def _opened(self, file: str) -> Any:
        """A shard, open until another one is read: to open it is to parse the headers of all its tensors."""
        if self._open is None or self._open[0] != file:
            self._open = None
            self._open = file, safe_open(self.directory / file, framework="pt")
        return self._open[1]

    def _weight_map(self) -> dict[str, str]:
        if self.index_file is None:
            return {}
        weight_map = read_json_object(self.index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{self.index_file}: expected an object 'weight_map' of tensor name to file name.")
        for name in weight_map:
            check_name(name, self.index_file)
        for shard in sorted(set(weight_map.values())):
            check_name(shard, self.index_file)
            if Path(shard).is_absolute() or ".." in Path(shard).parts:
                raise CheckpointError(
                    f"{self.index_file}: shard {shard!r} lies outside the checkpoint directory. "
                    "Do not use this checkpoint unless you trust where it came from."
                )
            if not os.path.exists(self.directory / shard):  # False also for names that no file can have
                raise CheckpointError(
                    f"{self.index_file}: shard {shard} is missing. Download or copy it into {self.directory}."
                )
        return weight_map

    def _indexed_shards(self, weight_map: dict[str, str]) -> list[str]:
        """The files that the index names, which must be all there are: vLLM would read the others too."""
        shards = sorted(set(weight_map.values()))
        others = sorted({file.name for file in self.directory.glob("*.safetensors")}.difference(shards))
        if others:
            raise CheckpointError(
                f"{self.directory}: {', '.join(others)} {'are' if others[1:] else 'is'} not named by "
                f"{self.index_file.name if self.index_file else 'the index'}, so it is unclear which weights "
                "are the model's. Remove the files of another run or of the float model."
            )
        return shards

    def _loose_shards(self) -> list[str]:
        shards = sorted(file.name for file in self.directory.glob("*.safetensors"))
        if not shards:
            raise CheckpointError(f"{self.directory}: holds no *.safetensors file. Download or copy the weights.")
        return shards

    def _read_header(self, shard: str) -> Iterator[TensorInfo]:
        file = self.directory / shard
        check_name(shard, self.directory)
        if not file.is_file():  # a pipe or a device would be read without end
            raise CheckpointError(f"{file}: is no file, or a link to none. Download or copy it again.")
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    check_name(name, file)
                    part = opened.get_slice(name)
                    yield TensorInfo(name, shard, part.get_dtype(), tuple(part.get_shape()))
        except PermissionError:
            raise CheckpointError(unreadable(file)) from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: not a whole safetensors file ({error}), size {file.stat().st_size} bytes. "
                "The copy was probably cut short; copy or download it again."
            ) from None
