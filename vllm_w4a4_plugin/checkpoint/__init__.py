# SPDX-License-Identifier: Apache-2.0
"""Reading and checking msModelSlim checkpoints. Imports neither vLLM nor torch."""

from vllm_w4a4_plugin.constants import DESCRIPTION_FILE

from . import type_table  # noqa: F401 - imported to register the types
from .description import QuantDescription, load_description
from .errors import CheckpointError
from .reader import CheckpointReader, TensorInfo
from .resolve import resolve
from .types import QuantType, TypeSpec, register_type

__all__ = [
    "DESCRIPTION_FILE",
    "CheckpointError",
    "CheckpointReader",
    "QuantDescription",
    "QuantType",
    "TensorInfo",
    "TypeSpec",
    "load_description",
    "register_type",
    "resolve",
]
