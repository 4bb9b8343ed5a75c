# SPDX-License-Identifier: Apache-2.0
"""Engines of vLLM for one test or one file of tests."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vllm import LLM

SMALL = {
    "max_model_len": 128,
    "dtype": "float32",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "gpu_memory_utilization": 0.2,
}


@contextmanager
def engine(directory: Path, in_this_process: bool = False, **arguments: Any) -> Iterator[LLM]:
    """An engine for a small model, in eager mode and float32 unless `arguments` say otherwise; shut down at the end.

    Args:
        in_this_process: spares a process of its own, which imports vLLM again, and its errors are those raised.
    """
    with patch.dict(os.environ, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if in_this_process else {}):
        llm = LLM(str(directory), **{**SMALL, **arguments})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
