# SPDX-License-Identifier: Apache-2.0
"""How much of a checkpoint's files each of two rank processes reads while it loads its part of the model."""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vllm.model_executor.model_loader import default_loader

from tests.loading import loaded_model
from tools.demo import free_port

RANKS = 2


def fractions_read(directory: Path) -> list[float]:
    """By rank, bytes of the weight files' pages that the process touched / bytes of the files."""
    port = free_port()
    with multiprocessing.get_context("spawn").Pool(RANKS) as pool:
        return pool.starmap(_fraction_read, [(directory, rank, port) for rank in range(RANKS)])


def _fraction_read(directory: Path, rank: int, port: int) -> float:
    os.environ |= {"LOCAL_RANK": str(rank), "VLLM_DIST_IDENT": f"w4a4_{port}"}  # as vLLM's executor does
    read: dict[Path, int] = {}
    original = default_loader.safetensors_weights_iterator

    def observed(files: list[str], *args: Any, **kwargs: Any) -> Iterator[Any]:
        for pair in original(files, *args, **kwargs):
            yield pair
            del pair
            for file, pages in _pages_in_memory(directory).items():
                read[file] = max(read.get(file, 0), pages)

    observing = patch.object(default_loader, "safetensors_weights_iterator", observed)
    with observing, loaded_model(directory, rank, port, tensor_parallel_size=RANKS):
        pass
    return sum(read.values()) / sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _pages_in_memory(directory: Path) -> dict[Path, int]:
    """Weight file -> bytes of it that this process has mapped and touched.

    The kernel maps pages around a touched one as well, at most 64 KiB.
    """
    found: dict[Path, int] = {}
    file = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            path = Path(words[-1])
            file = path if path.suffix == ".safetensors" and path.is_relative_to(directory) else None
        elif words[0] == "Rss:" and file is not None:
            found[file] = found.get(file, 0) + 1024 * int(words[1])
    return found
