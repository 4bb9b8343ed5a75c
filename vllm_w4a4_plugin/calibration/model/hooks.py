# SPDX-License-Identifier: Apache-2.0
"""Hooks of modules, for as long as they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(*hooks: RemovableHandle) -> Iterator[None]:
    """Remove hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
