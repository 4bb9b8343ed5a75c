# SPDX-License-Identifier: Apache-2.0
"""Writing a checkpoint directory: shards, index, description and the model's small files, all or nothing."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_w4a4_plugin.constants import DESCRIPTION_FILE, INDEX_SUFFIX

from .description import read_json_object
from .errors import CheckpointError
from .types import QuantType

MODEL_QUANT_TYPE = "W4A4_FLATQUANT_DYNAMIC"
FORMAT_VERSION = "1.0.0"
SHARD_BYTES = 4 * 10**9
METADATA = {"format": "pt"}
"""What safetensors' writer for torch says in the headers of its files."""
_COPY_BYTES = 1 << 24
_FILE_MODE = 0o644
_NOT_COPIED = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    INDEX_SUFFIX,
    ".bin.index.json",
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor inside an existing safetensors file.

    Attributes:
        name: its name. file: the file. dtype, shape: as in the header.
        start, stop: byte range of the data within the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return self.stop - self.start

    def pieces(self) -> Iterator[bytes]:
        """The data, in pieces that fit into memory whatever its size.

        Raises:
            CheckpointError: the file is shorter than its header says.
        """
        return self.read(_COPY_BYTES)

    def read(self, size: int) -> Iterator[bytes]:
        """The stored data in pieces of `size` bytes, of which the last may be shorter."""
        with self.file.open("rb") as source:
            source.seek(self.start)
            left = self.stop - self.start
            while left:
                piece = source.read(min(left, size))
                if len(piece) < min(left, size):
                    raise CheckpointError(f"{self.file}: ends before the data of tensor {self.name}.")
                yield piece
                left -= len(piece)


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file in the order of their data."""
    return read_shard(file)[0]


def read_shard(file: Path) -> tuple[list[StoredTensor], dict[str, str] | None]:
    """The tensors of a safetensors file in the order of their data, and the metadata of its header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    metadata = header.pop("__metadata__", None)
    base = 8 + length
    tensors = [
        StoredTensor(
            name, file, h["dtype"], tuple(h["shape"]), base + h["data_offsets"][0], base + h["data_offsets"][1]
        )
        for name, h in header.items()
    ]
    return sorted(tensors, key=lambda t: t.start), metadata


def write_checkpoint(
    source: Path,
    output: Path,
    parts: Sequence[Path],
    types: Mapping[str, QuantType],
    headline: str = MODEL_QUANT_TYPE,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    extras: Mapping[str, str] | None = None,
) -> None:
    """Write the checkpoint directory `output`; it appears complete or not at all.

    Tensor data is copied from `parts` byte by byte, so memory does not grow with the model.

    Args:
        source: the float model's directory, for its config and tokenizer files.
        output: must not exist.
        parts: safetensors files with the tensors, in the order in which they are written.
        types: quant type of every tensor, in the order of the description.
        headline: `model_quant_type` of the description; its lower case names the weight files.
        config: keys of config.json that change.
        shard_bytes: most bytes of tensor data in a file.
        extras: further small files, name -> text.

    Raises:
        CheckpointError: `output` exists, a tensor has no type or no data, or the disk is full.
    """
    tensors = {tensor.name: tensor for part in parts for tensor in stored_tensors(part)}
    if different := set(tensors) ^ set(types):
        raise CheckpointError(f"{output}: tensor {min(different)} has data or a quant type, but not both.")
    with new_directory(output) as staging:
        copy_small_files(source, staging)
        _write_config(source, staging, headline, config or {})
        _write_weights(staging, [tensors[name] for name in types], headline, shard_bytes)
        write_json(staging / DESCRIPTION_FILE, _description(types, headline))
        for name, text in (extras or {}).items():
            (staging / name).write_text(text, encoding="utf-8")


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """Context with an empty directory to write to, which becomes `output` at the end if nothing was raised.

    Raises:
        CheckpointError: `output` exists, or cannot be written; then it does not exist afterwards.
    """
    if output.exists():
        raise CheckpointError(f"{output}: exists already. Remove it or choose another output directory.")
    staging = output.with_name(f".{output.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        for file in staging.iterdir():
            file.chmod(_FILE_MODE)
            _flush(file)
        staging.replace(output)
    except OSError as error:
        raise CheckpointError(
            f"{output}: cannot be written: {error}. Free disk space or choose another place."
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _description(types: Mapping[str, QuantType], headline: str) -> dict[str, Any]:
    return {
        "version": FORMAT_VERSION,
        "model_quant_type": headline,
        **{name: kind.value for name, kind in types.items()},
        "kv_quant_type": None,
        "fa_quant_type": None,
        "group_size": 0,
    }


def copy_small_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation settings and whatever else is in the directory of the weights."""
    for file in sorted(source.iterdir()):
        hidden = file.name.startswith(".") or file.name in ("config.json", DESCRIPTION_FILE)
        if file.is_file() and not hidden and not file.name.endswith(_NOT_COPIED):
            shutil.copyfile(file, target / file.name)


def _write_config(source: Path, target: Path, headline: str, changes: Mapping[str, Any]) -> None:
    config = read_json_object(source / "config.json")
    config.pop("quantization_config", None)
    write_json(target / "config.json", {**config, **changes, "quantize": headline.lower()})


def _write_weights(target: Path, tensors: Sequence[StoredTensor], headline: str, shard_bytes: int) -> None:
    stem = f"quant_model_weight_{headline.lower()}"
    shards = list(split_shards(tensors, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(target / name, aligned(shard))
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    write_json(target / f"{stem}{INDEX_SUFFIX}", {"metadata": {"total_size": total}, "weight_map": weight_map})


def split_shards(tensors: Iterable[StoredTensor], limit: int) -> Iterator[list[StoredTensor]]:
    """Consecutive groups of tensors with at most `limit` bytes of data, or one tensor, in each."""
    shard: list[StoredTensor] = []
    for tensor in tensors:
        if shard and sum(t.nbytes for t in shard) + tensor.nbytes > limit:
            yield shard
            shard = []
        shard.append(tensor)
    if shard:
        yield shard


def aligned(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """The widest dtypes first, as safetensors itself does: readers that map the file want aligned tensors."""
    width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}
    return sorted(tensors, key=lambda t: -width.get(t.dtype, 1))


def write_shard(
    file: Path,
    tensors: Sequence[StoredTensor],
    metadata: Mapping[str, str] | None = METADATA,
    wrote: Callable[[int], object] = lambda size: None,
) -> None:
    """Write a safetensors file with the tensors in the given order.

    Args:
        file: to write.
        tensors: their data is copied.
        metadata: of the header.
        wrote: called with the number of bytes of data after each piece.

    Raises:
        CheckpointError: a source file ends early.
        OSError: the disk is full.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]
        }  # fmt: skip
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as output:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            for piece in tensor.pieces():
                output.write(piece)
                wrote(len(piece))


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
