# SPDX-License-Identifier: Apache-2.0
"""FlatQuant calibration: from a float Hugging Face model to a checkpoint of int4 weights and online transforms.

    from pathlib import Path
    from vllm_w4a4_plugin.calibration import QuantizeOptions, quantize

    report = quantize(Path("Qwen3-8B"), Path("Qwen3-8B-W4A4"), QuantizeOptions(calib_file="texts.json"))

Importing this package imports neither torch nor transformers; the names below are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Report, quantize
    from .errors import CalibrationError
    from .options import QuantizeOptions

__all__ = ["CalibrationError", "QuantizeOptions", "Report", "quantize"]

_MODULES = {"CalibrationError": "errors", "QuantizeOptions": "options", "Report": "api", "quantize": "api"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
