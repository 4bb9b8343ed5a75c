# SPDX-License-Identifier: Apache-2.0
"""One checkpoint in another form: int4 weights packed or not, other file names, other shards; the same values."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_w4a4_plugin.constants import DESCRIPTION_FILE, INDEX_SUFFIX, INT4_MAX, INT4_MIN

from .description import read_json_object
from .errors import DAMAGED, CheckpointError
from .inventory import Inventory
from .packed import is_packed, pack_rows
from .reader import CheckpointReader
from .runnable import ON_CPU, ON_NPU
from .types import PACKED_DTYPE, WEIGHT, QuantType, known_types
from .verify import header_findings
from .writer import (
    METADATA,
    MODEL_QUANT_TYPE,
    StoredTensor,
    aligned,
    copy_small_files,
    new_directory,
    read_shard,
    split_shards,
    write_json,
    write_shard,
)

NAMINGS = ("v0", "v1")
"""How msModelSlim names the weight files: after the model's quant type, or `quant_model_weights`."""

_PIECE_BYTES = 1 << 24
_SHOWN_FINDINGS = 3


@dataclass(frozen=True)
class Form:
    """How a checkpoint is to be stored; None: as it is.

    Attributes:
        packed: whether int4 weights are stored two to a byte.
        naming: of NAMINGS.
        shard_bytes: most bytes of tensor data in a file.
    """

    packed: bool | None = None
    naming: str | None = None
    shard_bytes: int | None = None


@dataclass(frozen=True)
class Converted:
    """What became of a checkpoint.

    Attributes:
        weights: number of weights whose form changed.
        unpackable: names of int4 weights with an odd number of rows, which stay unpacked.
        bytes_before, bytes_after: of the data of all tensors.
        files: number of weight files.
    """

    weights: int
    unpackable: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    files: int


@dataclass(frozen=True)
class Packed(StoredTensor):
    """An unpacked int4 weight of an even number of rows, to be written packed."""

    def pieces(self) -> Iterator[bytes]:
        for codes in _row_pairs(self):
            if codes.min() < INT4_MIN or codes.max() > INT4_MAX:
                raise CheckpointError(
                    f"{self.file}: tensor {self.name}: expected int4 values in [{INT4_MIN}, {INT4_MAX}], found values "
                    f"from {codes.min()} to {codes.max()}. {DAMAGED}"
                )
            yield pack_rows(codes).tobytes()

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) // 2


@dataclass(frozen=True)
class Unpacked(StoredTensor):
    """A packed int4 weight, to be written with one value to a byte."""

    def pieces(self) -> Iterator[bytes]:
        width = self.shape[1]
        for data in self.read(max(1, _PIECE_BYTES // max(1, width)) * width):
            bytes_ = np.frombuffer(data, np.int8).reshape(-1, width)
            yield np.stack(((bytes_ << 4) >> 4, bytes_ >> 4), 1).tobytes()

    @property
    def nbytes(self) -> int:
        return 2 * (self.stop - self.start)


def convert(
    source: Path, output: Path, form: Form, wrote: Callable[[int, int], object] = lambda done, total: None
) -> Converted:
    """Write the checkpoint `source` to the directory `output` in another form.

    Data is copied piece by piece, so that memory does not grow with the model. The result passes the same checks of
    headers as the source before it appears.

    Args:
        source: a checkpoint that passes these checks.
        output: must not exist.
        form: to store it in.
        wrote: called with the bytes that have been written and those that will be.

    Raises:
        CheckpointError: `source` is damaged or `output` cannot be written; then `output` does not exist.
    """
    if output.exists():
        raise CheckpointError(f"{output}: exists already. Remove it or choose another output directory.")
    reader = CheckpointReader(source)
    _check(reader, "cannot be converted, because it would not be served")
    shards, unpackable = _planned(reader, form)
    names = _names(reader, form, len(shards))
    tensors = [tensor for shard, _ in shards for tensor in shard]
    total = sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(next(folder for folder in output.absolute().parents if folder.exists())).free
    if free < total:
        raise CheckpointError(f"{output}: needs {total / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there.")
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        wrote(done, total)

    with new_directory(output) as staging:
        copy_small_files(source, staging)
        for name, (shard, metadata) in zip(names, shards, strict=True):
            write_shard(staging / name, shard, metadata, count)
        _write_index(
            reader, staging, _stem(reader, form), names, [[t.name for t in shard] for shard, _ in shards], total
        )
        for name in ("config.json", DESCRIPTION_FILE):  # last, so that what is left of a killed run is no checkpoint
            shutil.copyfile(source / name, staging / name)
        _check(CheckpointReader(staging), "came out wrong, which is a fault of this program")
    before = sum(info.nbytes for info in reader.tensors.values())
    changed = sum(isinstance(tensor, Packed | Unpacked) for tensor in tensors)
    return Converted(changed, tuple(unpackable), before, total, len(names))


def _check(reader: CheckpointReader, problem: str) -> None:
    """Raise if there are header findings, wherever the layers are to run."""
    findings = list(header_findings(reader, ON_CPU | ON_NPU))
    if findings:
        more = f" (and {len(findings) - _SHOWN_FINDINGS} more)" if len(findings) > _SHOWN_FINDINGS else ""
        raise CheckpointError(f"{reader.directory}: {problem}: {' '.join(findings[:_SHOWN_FINDINGS])}{more}")


def _planned(
    reader: CheckpointReader, form: Form
) -> tuple[list[tuple[list[StoredTensor], dict[str, str] | None]], list[str]]:
    """The tensors of each file to write with the metadata of its header, and the names of unpackable weights."""
    inventory = Inventory.of(reader)
    unpackable: list[str] = []

    def stored_as(tensor: StoredTensor) -> StoredTensor:
        module, _, suffix = tensor.name.rpartition(".")
        written = inventory.description.modules.get(module, "")
        if suffix != WEIGHT or form.packed is None or written not in known_types() or len(tensor.shape) != 2:
            return tensor
        kind, (rows, columns) = QuantType(written), tensor.shape
        described = kind.spec.tensor(WEIGHT)
        if not form.packed and tensor.dtype == PACKED_DTYPE:
            return _as(Unpacked, tensor, "I8", (2 * rows, columns))
        is_int4 = described is not None and PACKED_DTYPE in described.dtypes and tensor.dtype == "I8"
        if not form.packed or not is_int4 or is_packed(inventory.module(module), kind):
            return tensor
        if rows % 2:
            unpackable.append(tensor.name)
            return tensor
        return _as(Packed, tensor, PACKED_DTYPE, (rows // 2, columns))

    files = list(dict.fromkeys(info.file for info in reader.tensors.values()))
    shards = []
    for file in files:
        tensors, metadata = read_shard(reader.directory / file)
        shards.append(([stored_as(tensor) for tensor in tensors], metadata))
    if form.shard_bytes is None:
        return shards, unpackable
    everything = [tensor for shard, _ in shards for tensor in shard]
    return [(aligned(shard), dict(METADATA)) for shard in split_shards(everything, form.shard_bytes)], unpackable


def _as(kind: type[StoredTensor], tensor: StoredTensor, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    return kind(tensor.name, tensor.file, dtype, shape, tensor.start, tensor.stop)


def _row_pairs(tensor: Packed) -> Iterator[np.ndarray]:
    """int8 [rows, input_size] of the stored weight, an even number of rows at a time."""
    width = tensor.shape[1]
    for data in tensor.read(2 * max(1, _PIECE_BYTES // max(1, 2 * width)) * width):
        yield np.frombuffer(data, np.int8).reshape(-1, width)


def _stem(reader: CheckpointReader, form: Form) -> str:
    if form.naming is None and reader.index_file is not None:
        return reader.index_file.name.removesuffix(INDEX_SUFFIX)
    if form.naming == "v1":
        return "quant_model_weights"
    headline = reader.description.model_quant_type or ""
    # What a file says must not become a path.
    return f"quant_model_weight_{(headline if re.fullmatch(r'[A-Za-z0-9_]+', headline) else MODEL_QUANT_TYPE).lower()}"


def _names(reader: CheckpointReader, form: Form, count: int) -> list[str]:
    """Of the weight files."""
    files = list(dict.fromkeys(info.file for info in reader.tensors.values()))
    is_flat = all(Path(file).name == file for file in files)
    if form.naming is None and form.shard_bytes is None and is_flat:
        return files
    stem = _stem(reader, form)
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_index(
    reader: CheckpointReader, target: Path, stem: str, names: list[str], shards: list[list[str]], total: int
) -> None:
    """The source's index with other files and another size, tensors in the same order."""
    found = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = read_json_object(reader.index_file) if reader.index_file is not None else {}
    order = dict.fromkeys([*index.get("weight_map", {}), *found])
    metadata = index.get("metadata")
    index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    index["weight_map"] = {tensor: found[tensor] for tensor in order if tensor in found}
    write_json(target / f"{stem}{INDEX_SUFFIX}", index)
