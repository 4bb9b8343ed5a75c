# SPDX-License-Identifier: Apache-2.0
"""vLLM's replacements of Triton kernels, in a process that has imported anything.

Where there is no Triton, each engine of vLLM looks for its kernels among the attributes of everything in every module,
and takes every `__dict__` for a mapping. Those of llvmlite's library are functions: no engine starts in a process that
has imported numba, which an engine that speculates with n-grams does.
Drop this when `_rebind_kernels` of vLLM's `triton_utils/dispatcher.py` expects that.
"""

from collections.abc import Mapping
from typing import Any


def attributes(value: Any) -> Mapping[str, Any]:
    """`vars(value)` if that is a mapping, else an empty one."""
    found = vars(value)
    return found if isinstance(found, Mapping) else {}


def expect_any_object() -> None:
    """Let vLLM's search pass over objects whose attributes cannot be listed."""
    from vllm.triton_utils import dispatcher

    dispatcher.vars = attributes
