# SPDX-License-Identifier: Apache-2.0
"""Loading on two ranks reads each rank's part of the checkpoint."""

import os
import tempfile
from pathlib import Path

import pytest

from benchmarks import random_model
from benchmarks.shapes import Model
from tests.engine.read_bytes import RANKS, fractions_read

# Tensors of megabytes, so that pages which are mapped in passing are few.
MODEL = Model("m", hidden=1024, intermediate=4096, heads=8, kv_heads=4, head_dim=128, vocabulary=4096)
SMALL_PAGES = "/dev/shm"
"""A file system whose files are mapped in pages of 4 KiB; others may map 2 MiB at a time."""


@pytest.mark.skipif(not os.access(SMALL_PAGES, os.W_OK), reason=f"pages of files in {SMALL_PAGES} are counted")
def test_each_rank_reads_its_half() -> None:
    """W4A4 with transforms, W8A8 and FLOAT, column- and row-parallel, and the embedding."""
    with tempfile.TemporaryDirectory(dir=SMALL_PAGES) as directory:
        random_model.make(Path(directory) / "model", MODEL, 1, "tutorial")
        fractions = fractions_read(Path(directory) / "model")
    print([f"{fraction:.1%}" for fraction in fractions])
    assert len(fractions) == RANKS
    for fraction in fractions:
        assert 0.49 < fraction < 0.56
