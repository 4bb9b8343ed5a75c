# SPDX-License-Identifier: Apache-2.0
"""Engines of vLLM for one test or one file of tests."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM
from vllm.triton_utils import dispatcher

SMALL = {
    "max_model_len": 128,
    "dtype": "float32",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "gpu_memory_utilization": 0.2,
}


def _attributes(value: Any) -> Mapping[str, Any]:
    found = vars(value)
    return found if isinstance(found, Mapping) else {}


# Where there is no Triton, an engine looks at the attributes of everything in every module. Those of llvmlite's
# library, which numba imports for an engine that speculates with n-grams, are functions, also `__dict__`: later engines
# of the same process would fail. Drop this when vLLM's `_rebind_kernels` expects that.
dispatcher.vars = _attributes  # type: ignore[attr-defined]


@contextmanager
def engine(directory: Path, **arguments: Any) -> Iterator[LLM]:
    """An engine for a small model, in eager mode and float32 unless `arguments` say otherwise; shut down at the end."""
    llm = LLM(str(directory), **{**SMALL, **arguments})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
