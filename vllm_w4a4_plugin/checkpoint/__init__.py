# SPDX-License-Identifier: Apache-2.0
"""Reading and checking msModelSlim checkpoints. Imports neither vLLM nor torch."""

from .description import DESCRIPTION_FILE, QuantDescription, QuantType, load_description
from .errors import CheckpointError
from .reader import CheckpointReader, TensorInfo
from .resolve import resolve

__all__ = [
    "DESCRIPTION_FILE",
    "CheckpointError",
    "CheckpointReader",
    "QuantDescription",
    "QuantType",
    "TensorInfo",
    "load_description",
    "resolve",
]
