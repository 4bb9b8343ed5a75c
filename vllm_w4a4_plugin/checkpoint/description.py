# SPDX-License-Identifier: Apache-2.0
"""`quant_model_description.json`: the file in which msModelSlim says how each tensor is quantized."""

import json
import stat
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_w4a4_plugin.constants import DESCRIPTION_FILE

from .errors import CheckpointError
from .types import QuantType

MAX_JSON_BYTES = 1 << 27
"""The description of a model with 256 experts in each of 60 layers has a tenth of this."""

MAX_JSON_DEPTH = 64

MAX_DIGITS = 18


class QuantDescription(BaseModel):
    """Parsed description file.

    Attributes:
        version: format version, "1.0.0" so far.
        model_quant_type: the producer's headline type. Not used to choose anything: v1 files say `W4A4_DYNAMIC`
            although their layers are `W4A4_FLATQUANT_DYNAMIC`; the entry of each tensor decides.
        kv_quant_type, kv_cache_type, fa_quant_type: KV cache and attention quantization, None when off.
        group_size: 0 for per-channel weights.
        tensors: tensor name -> type as written. Types that this package does not know are kept here and
            refused only when a layer needs them.

    Top-level keys of other producers are kept as extra attributes.
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    version: str | None = None
    model_quant_type: str | None = None
    kv_quant_type: str | None = None
    kv_cache_type: str | None = None
    fa_quant_type: str | None = None
    group_size: int | None = 0
    metadata: dict[str, Any] | None = None
    optional: dict[str, Any] | None = None
    tensors: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str = DESCRIPTION_FILE) -> "QuantDescription":
        """Build a description from the flat JSON object.

        An entry whose key contains a dot is a tensor's; every other key is the file's own.

        Args:
            data: the decoded JSON object.
            source: name of the file, for error messages.

        Raises:
            CheckpointError: a value has the wrong type, or no tensor is described at all.
        """
        own = {key: value for key, value in data.items() if "." not in key}
        entries = {key: value for key, value in data.items() if "." in key}
        if _is_deeper(data, MAX_JSON_DEPTH):  # one that a hub client has read
            raise CheckpointError(too_deep(source))
        for text in (*data, *(value for value in data.values() if isinstance(value, str))):
            check_name(text, source)
        bad = {key: value for key, value in entries.items() if not isinstance(value, str)}
        if bad:
            key, value = next(iter(bad.items()))
            raise CheckpointError(
                f"{source}: the type of tensor {key!r} must be a string such as {QuantType.FLOAT.value!r}, "
                f"found {value!r} ({len(bad)} such entries). Write the file again with the tool that made it."
            )
        if not entries:
            raise CheckpointError(
                f"{source}: describes no tensor. Expected entries of the form "
                f'"model.layers.0.self_attn.q_proj.weight": "{QuantType.W4A4_FLATQUANT_DYNAMIC}".'
            )
        try:
            return cls.model_validate({**own, "tensors": entries})
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}, found {item['input']!r}" for item in error.errors()
            )
            raise CheckpointError(f"{source}: {problems}") from None

    def renamed(self, rename: Callable[[dict[str, str]], dict[str, str]]) -> "QuantDescription":
        """The same description with tensor names mapped by `rename` (a dict of names in, a dict of names out)."""
        copy = self.model_copy(update={"tensors": rename(dict(self.tensors))})
        for derived in ("modules", "children"):
            copy.__dict__.pop(derived, None)
        return copy

    @cached_property
    def modules(self) -> dict[str, str]:
        """Module name -> type as written, for every module that has a `weight` entry."""
        return {name.removesuffix(".weight"): t for name, t in self.tensors.items() if name.endswith(".weight")}

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """Name of a module -> names of the modules right below it; "" -> the top ones. Only paths to `modules`."""
        children: dict[str, dict[str, None]] = {}
        for name in self.modules:
            while name:
                parent = name.rpartition(".")[0]
                siblings = children.setdefault(parent, {})
                if name in siblings:
                    break
                siblings[name] = None
                name = parent
        return {parent: list(names) for parent, names in children.items()}


def load_description(path: str | Path) -> QuantDescription:
    """Read a description file.

    Args:
        path: the file, or the checkpoint directory that contains it.

    Raises:
        CheckpointError: missing, unreadable, not JSON, or not a description.
    """
    path = Path(path)
    file = path / DESCRIPTION_FILE if path.is_dir() else path
    return QuantDescription.parse(read_json_object(file), str(file))


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Raises:
        CheckpointError: missing, unreadable, not JSON, not an object, larger than `MAX_JSON_BYTES`, or nested more
            than `MAX_JSON_DEPTH` deep.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file}: is no file. Copy the file from where it was made.")
        if status.st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{file}: {status.st_size} bytes of JSON, more than {MAX_JSON_BYTES}, which no checkpoint needs. "
                "Do not use this checkpoint unless you trust where it came from."
            )
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: not found. A checkpoint made by msModelSlim has this file next to config.json; "
            "check the model path, or quantize the model first."
        ) from None
    except PermissionError:
        raise CheckpointError(unreadable(file)) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}. Copy it again.") from None
    except (ValueError, RecursionError) as error:  # a ValueError also for bytes that are not UTF-8 and for huge numbers
        raise CheckpointError(
            f"{file}: not valid JSON ({error}). Copy the file again from where it was made."
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(data).__name__}.")
    if _is_deeper(data, MAX_JSON_DEPTH):
        raise CheckpointError(too_deep(file))
    return data


def too_deep(source: object) -> str:
    """Message for JSON with more than `MAX_JSON_DEPTH` levels."""
    return (
        f"{source}: nested more than {MAX_JSON_DEPTH} levels deep, which no checkpoint needs. "
        "Do not use this checkpoint unless you trust where it came from."
    )


def _is_deeper(data: Any, limit: int) -> bool:
    """Whether JSON data has more levels than `limit`. Without recursion, which the data could exhaust."""
    level = [data]
    for _ in range(limit + 1):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        ]
        if not level:
            return False
    return True


def check_name(name: str, source: object) -> None:
    """Refuse a name that could not be printed as it is, or has a number that none has.

    Args:
        name: of a tensor, a file or a quant type, from a file of the checkpoint.
        source: this file.

    Raises:
        CheckpointError: it has control characters or others that a terminal obeys, or half of a surrogate pair; or a
            number between its dots has more than `MAX_DIGITS` digits. Python converts no number of thousands.
    """
    if not name.isprintable():
        raise CheckpointError(
            f"{source}: the name {name!a} has characters that cannot be printed. "
            "Do not use this checkpoint unless you trust where it came from."
        )
    if any(part.isdecimal() and len(part) > MAX_DIGITS for part in name.split(".")):
        raise CheckpointError(
            f"{source}: the name {name[:60]!r}... has a number of more than {MAX_DIGITS} digits. "
            "Do not use this checkpoint unless you trust where it came from."
        )


def unreadable(file: Path) -> str:
    """Message for a file that exists but may not be read; msModelSlim leaves its files with mode 0400."""
    return (
        f"{file}: no permission to read it. The quantization tool writes its files readable by their owner only; "
        f"run `chmod -R u+rwX,go+rX {file.parent}` as the owner."
    )
