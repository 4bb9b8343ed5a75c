# SPDX-License-Identifier: Apache-2.0
"""Damage to the files of a checkpoint directory: bytes, lengths, headers, JSON, and which files there are.

`damage` changes one directory, whose files may be hard links to others: a file is replaced, never written to.
"""

import json
import os
import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from random import Random

from tests.conftest import DESCRIPTION

INDEX = ".safetensors.index.json"


class Expected(StrEnum):
    """What is known of a damaged checkpoint without looking at it."""

    GOOD = "it must load"
    BAD = "it must be refused"
    EITHER = "it loads correctly or is refused"


def damage(directory: Path, outside: Path, random: Random) -> tuple[str, Expected]:
    """Damage a directory in one way.

    Args:
        directory: a checkpoint.
        outside: a directory next to it, with the same files.
        random: decides how.

    Returns:
        What was done, and what must come of it.
    """
    files = sorted(file for file in directory.iterdir() if not file.is_symlink() and file.is_file())
    weights = [file for file in files if file.suffix == ".safetensors"]
    texts = [f for f in files if f.name in ("config.json", DESCRIPTION) or f.name.endswith(INDEX)]
    kind = random.choice(("bytes of weights", "header", "JSON", "JSON", "files", "files", "links", "index"))
    if kind == "bytes of weights":
        return _bytes(random.choice(weights), random)
    if kind == "header":
        return _header(random.choice(weights), random)
    if kind == "JSON":
        return _json(random.choice(texts), random)
    if kind == "files":
        return _files(directory, random, weights, texts)
    if kind == "links":
        return _links(random.choice([*weights, *texts]), outside, random)
    return _index(directory, outside, random)


def _replace(file: Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)


def _bytes(file: Path, random: Random) -> tuple[str, Expected]:
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    way = random.choice(("flip", "flip", "flip", "many flips", "zeros", "truncated", "longer", "removed", "repeated"))
    place = random.randrange(8 + length, len(data))
    size = random.choice((1, 4, 100, 5000))
    said = f"{file.name}: {way} at {place}, {size} bytes"
    if way == "flip":
        data[place] ^= 1 << random.randrange(8)
    elif way == "many flips":
        for _ in range(size):
            data[random.randrange(8 + length, len(data))] ^= 1 << random.randrange(8)
    elif way == "zeros":
        stop = min(place + size, len(data))
        data[place:stop] = bytes(stop - place)
    elif way == "truncated":
        del data[random.choice((place, len(data) - 1, 8 + length, 8, 7, 0)) :]
    elif way == "longer":
        data += bytes(size)
    elif way == "removed":
        del data[place : place + size]
    else:
        data[place:place] = data[place : place + size]
    _replace(file, bytes(data))
    changes_length = way in ("truncated", "longer", "removed", "repeated")
    return said, Expected.BAD if changes_length else Expected.EITHER


def _header(file: Path, random: Random) -> tuple[str, Expected]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    way = random.choice(("length", "flip", "digit", "dtype", "two tensors in one place", "same name twice", "nothing"))
    if way == "length":
        new = random.choice((0, 1, length - 1, length + 1, length + 8, len(data), 10**9, 2**40, 2**63, 2**64 - 1))
        _replace(file, new.to_bytes(8, "little") + header + rest)
        return f"{file.name}: header length {length} -> {new}", Expected.BAD if abs(
            new - length
        ) > 8 else Expected.EITHER
    if way == "flip":
        changed = bytearray(header)
        changed[random.randrange(length)] ^= 1 << random.randrange(8)
        header = bytes(changed)
    elif way == "digit":
        places = [match.start() for match in re.finditer(rb"\d", header)]
        place = random.choice(places)
        header = header[:place] + str(random.randrange(10)).encode() + header[place + 1 :]
    elif way == "dtype":
        found = random.choice(list(re.finditer(rb'"(F32|BF16|I8|U8|F16)"', header)))
        new_dtype = random.choice((b"F32", b"I8", b"U8", b"F64", b"BOOL", b"F8_E4M3", b"C64", b"X9", b""))
        header = header[: found.start(1)] + new_dtype + header[found.end(1) :]
    else:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        first, second = random.sample(sorted(entries), 2)
        if way == "two tensors in one place":
            entries[first] = entries[second]
        elif way == "nothing":
            entries, rest = {}, b""
        header = json.dumps(entries).encode()
        if way == "same name twice":
            header = header[:-1] + b', "' + first.encode() + b'": ' + json.dumps(entries[second]).encode() + b"}"
    _replace(file, len(header).to_bytes(8, "little") + header + rest)
    return f"{file.name}: header, {way}", Expected.EITHER


_TEXT_WAYS: dict[str, Callable[[bytes, Random], bytes]] = {
    "flip": lambda data, random: _flipped(data, random),
    "a byte removed": lambda data, random: data[: (place := random.randrange(len(data)))] + data[place + 1 :],
    "truncated": lambda data, random: data[: random.randrange(len(data))],
    "empty": lambda data, random: b"",
    "deep": lambda data, random: b'{"a":' * random.choice((70, 1500, 200_000)) + b"1",
    "deep list": lambda data, random: b"[" * random.choice((1500, 200_000)),
    "huge number": lambda data, random: _with(data, b"1" * random.choice((400, 5000))),
    "NaN": lambda data, random: _with(data, b"NaN"),
    "surrogate": lambda data, random: _with(data, b'"\\ud800"'),
    "escape": lambda data, random: _with(data, b'"\\u001b[31m\\u0000\\n"'),
    "UTF-16": lambda data, random: data.decode().encode("utf-16"),
    "byte order mark": lambda data, random: b"\xef\xbb\xbf" + data,
    "null bytes": lambda data, random: bytes(len(data)),
    "value": lambda data, random: _other_value(data, random),
    "name": lambda data, random: _other_name(data, random),
}
_BROKEN = {"empty", "deep", "deep list", "null bytes", "UTF-16", "truncated"}


def _json(file: Path, random: Random) -> tuple[str, Expected]:
    way = random.choice(sorted(_TEXT_WAYS))
    data = file.read_bytes()
    if way == "truncated":
        data = data.rstrip()  # without its last line break it is still whole
    _replace(file, _TEXT_WAYS[way](data, random))
    return f"{file.name}: {way}", Expected.BAD if way in _BROKEN else Expected.EITHER


def _flipped(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _with(data: bytes, value: bytes) -> bytes:
    """An object with one more entry."""
    return data.rstrip()[:-1] + b', "added": ' + value + b"}"


def _other_value(data: bytes, random: Random) -> bytes:
    content = json.loads(data)
    holder = content["weight_map"] if "weight_map" in content and random.random() < 0.8 else content
    key = random.choice(sorted(holder))
    holder[key] = random.choice((None, True, -1, 0, 1e308, 2**70, "", "x", [], {}, [[]], {"a": {}}, "FLOAT", "I\u00e9"))
    return json.dumps(content).encode()


def _other_name(data: bytes, random: Random) -> bytes:
    content = json.loads(data)
    holder = content.get("weight_map", content)
    key = random.choice(sorted(holder))
    new = random.choice(
        ("", ".", "..", "a" * 5000, "\0", key.upper(), f"{key} ", f" {key}", f"{key}.weight", "\ud800", "日本")
    )
    holder[new] = holder.pop(key)
    return json.dumps(content).encode()


def _files(directory: Path, random: Random, weights: list[Path], texts: list[Path]) -> tuple[str, Expected]:
    file = random.choice([*weights, *texts])
    is_index = file.name.endswith(INDEX)
    way = random.choice(
        (
            "missing",
            "empty",
            "directory",
            "swapped",
            "harmless extras",
            "pickle",
            "second index",
            "more weights",
            "copy",
        )
    )
    said = f"{way}: {file.name}"
    if way == "missing":
        file.unlink()
        return said, Expected.GOOD if is_index and len(weights) == 1 else Expected.EITHER if is_index else Expected.BAD
    if way == "empty":
        _replace(file, b"")
        return said, Expected.BAD
    if way == "directory":
        file.unlink()
        file.mkdir()
        return said, Expected.BAD
    if way == "swapped":
        other = random.choice([f for f in (*weights, *texts) if f != file])
        data = file.read_bytes()
        _replace(file, other.read_bytes())
        _replace(other, data)
        return f"{said} with {other.name}", Expected.EITHER if file in weights and other in weights else Expected.BAD
    if way == "harmless extras":
        (directory / ".cache").mkdir()
        (directory / ".cache" / "x.safetensors").write_bytes(b"x")
        for name in ("README.md", "notes.txt", f"{DESCRIPTION}.bak", ".hidden", "model.safetensors.partial"):
            (directory / name).write_bytes(random.randbytes(50))
        return said, Expected.GOOD
    if way == "pickle":
        (directory / random.choice(("pytorch_model.bin", "model.pt", "consolidated.pth"))).write_bytes(b"\x80\x04.")
        return said, Expected.EITHER
    if way == "second index":
        (directory / f"other{INDEX}").write_bytes(random.choice((b"{}", b'{"weight_map": {}}', b"", b"[")))
        return said, Expected.BAD
    if way == "more weights":
        (directory / "model.safetensors").write_bytes(random.choice((b"", b"\x02" + bytes(7) + b"{}", b"x" * 100)))
        return said, Expected.BAD
    (directory / "copy.safetensors").write_bytes(weights[0].read_bytes())
    return said, Expected.BAD


def _links(file: Path, outside: Path, random: Random) -> tuple[str, Expected]:
    way = random.choice(("to an equal file", "nowhere", "loop", "device", "pipe", "directory"))
    file.unlink()
    if way == "pipe":
        os.mkfifo(file)
    else:
        targets = {
            "to an equal file": outside / file.name,  # as the caches of hubs have it
            "nowhere": "nowhere",
            "loop": file.name,
            "device": "/dev/zero",
            "directory": outside,
        }
        file.symlink_to(targets[way])
    # Without the index, whatever is left of it, the one file of weights still says everything; but a name that is
    # there and leads nowhere is no checkpoint as it was made.
    harmless = way == "to an equal file"
    return f"{file.name}: {way}", Expected.GOOD if harmless else Expected.EITHER if file.name.endswith(
        INDEX
    ) else Expected.BAD


def _index(directory: Path, outside: Path, random: Random) -> tuple[str, Expected]:
    """Entries that lead out of the directory, or to files that no tensor is in."""
    file = next(directory.glob(f"*{INDEX}"))
    content = json.loads(file.read_bytes())
    names = content["weight_map"]
    shard = next(iter(names.values()))
    out = f"{outside.name}/{shard}"
    place = random.choice(
        (
            f"../{out}", str(outside / shard), f"x/../../{out}", f"./../{out}", "..", ".", "", "/", "config.json",
            DESCRIPTION, "\0", "a" * 300, "x\n", f"{shard}/", "/dev/zero", "/dev/stdin",
        )
    )  # fmt: skip
    chosen = sorted(names) if random.random() < 0.3 else [random.choice(sorted(names))]
    for name in chosen:
        names[name] = place
    _replace(file, json.dumps(content).encode())
    return f"index: {len(chosen)} entries to {place!r}", Expected.BAD
