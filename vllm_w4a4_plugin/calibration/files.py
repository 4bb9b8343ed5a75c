# SPDX-License-Identifier: Apache-2.0
"""Files of an unfinished run: each exists in full or not at all."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full, or the directory is not writable.
    """
    partial = file.with_suffix(".partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    except SafetensorError as error:  # wraps the operating system's errors too
        raise OSError(str(error)) from None
    partial.replace(file)


def save_bytes(data: bytes, file: Path) -> None:
    """Write any file.

    Raises:
        OSError: the disk is full, or the directory is not writable.
    """
    partial = file.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(file)
