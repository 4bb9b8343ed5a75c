# SPDX-License-Identifier: Apache-2.0
"""Names that exist only to be imported: each raises when it is called."""

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"fla_npu.ops.ascendc.{name} is not part of the stand-in")

    return call
