# SPDX-License-Identifier: Apache-2.0
"""One scheme per quantization type: which parameters a layer has and which operator it calls."""

from vllm_w4a4_plugin.checkpoint import QuantType

from .base import LayerShape, LinearScheme
from .w4a4_dynamic import W4A4DynamicScheme
from .w4a4_flatquant_dynamic import W4A4FlatQuantDynamicScheme
from .w8a8_dynamic import W8A8DynamicScheme

SCHEMES: dict[QuantType, type[LinearScheme]] = {
    QuantType.W4A4_FLATQUANT_DYNAMIC: W4A4FlatQuantDynamicScheme,
    QuantType.W4A4_DYNAMIC: W4A4DynamicScheme,
    QuantType.W8A8_DYNAMIC: W8A8DynamicScheme,
}
"""FLOAT is missing on purpose: those layers keep vLLM's own unquantized method."""

__all__ = ["SCHEMES", "LayerShape", "LinearScheme"]
