# SPDX-License-Identifier: Apache-2.0
"""One scheme per quant type and backend: which parameters a layer has and which operator it calls.

FLOAT has no scheme on purpose: those layers keep vLLM's own unquantized method. Only `ascend_config` imports, and
thereby registers, the scheme for NPUs.
"""

from . import (  # noqa: F401 - imported to be registered
    w4a4_dynamic,
    w4a4_flatquant_dynamic,
    w4a8,
    w8a8,
    w8a8_dynamic,
    w8a8_flatquant_dynamic,
    weight_only,
)
from .base import Layer, LayerShape, LinearScheme
from .registry import new_scheme, register_scheme

__all__ = ["Layer", "LayerShape", "LinearScheme", "new_scheme", "register_scheme"]
