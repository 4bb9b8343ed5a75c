# SPDX-License-Identifier: Apache-2.0
"""Where calibration activations are kept: in memory, or in memory-mapped files that the system can page out."""

import os
import tempfile
from math import prod
from pathlib import Path

import torch
from torch import Tensor


class Activations:
    """Allocates float32 tensors with one row per token.

    Args:
        directory: for memory-mapped files; None keeps tensors in memory. A file has no name while it is in use, so
            its space is freed with its tensor, or when the process ends for whatever reason.
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
            # Allocated up front: a mapped file that outgrows the disk would kill the process with SIGBUS.
            os.posix_fallocate(file.fileno(), 0, 4 * prod(shape))
            return torch.from_file(file.name, shared=True, size=prod(shape)).view(shape)
