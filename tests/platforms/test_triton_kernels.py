# SPDX-License-Identifier: Apache-2.0
"""vLLM finds its Triton kernels in a process that has imported anything."""

import sys
from types import ModuleType

import pytest
from vllm.triton_utils import dispatcher

from vllm_w4a4_plugin.platforms.cpu import W4A4CpuPlatform


class Library:
    """As llvmlite's: every attribute is a function, also `__dict__`."""

    def __getattribute__(self, name: str) -> object:
        return lambda: name


def test_an_object_without_a_list_of_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("library_of_functions")
    module.lib = Library()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    monkeypatch.delattr(dispatcher, "vars", raising=False)
    W4A4CpuPlatform.register_triton_kernel_overrides()
    assert any("sample" in name for name in dispatcher._registry)
