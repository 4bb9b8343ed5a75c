# SPDX-License-Identifier: Apache-2.0
"""Where calibration activations live: in memory, or in files that the system maps and evicts as it needs."""

import os
import tempfile
from math import prod
from pathlib import Path

import torch
from torch import Tensor


class Activations:
    """Makes float32 tensors with one row per token.

    Args:
        directory: for the files, None for memory. A file has no name while it is in use, so that its space is freed
            when its tensor is, or when the process ends, however it ends.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor.

        Raises:
            OSError: the disk is full.
        """
        if self.directory is None:
            return torch.empty(shape)
        with tempfile.NamedTemporaryFile(dir=self.directory, prefix="activations-") as file:
            # Reserved now: a mapped file that outgrows the disk would end the process by a signal.
            os.posix_fallocate(file.fileno(), 0, 4 * prod(shape))
            return torch.from_file(file.name, shared=True, size=prod(shape)).view(shape)
