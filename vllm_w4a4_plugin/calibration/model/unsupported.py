# SPDX-License-Identifier: Apache-2.0
"""Models that cannot be quantized, named by what they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CalibrationError

SUPPORTED = "docs/reference/families.md lists the models that can be quantized."
OTHER_INPUTS = ("vision_config", "audio_config")
VISION_LANGUAGE = ("qwen2_5_vl", "qwen3_vl")
"""Values of `model_type` of vision-language models whose text part can be quantized."""


def family(config: Any) -> str:
    """The kind of model that a config of transformers is of, as config.json spells it."""
    return getattr(config, "model_type", "") or type(config).__name__


def has_vision(config: Any) -> bool:
    """Whether a config of transformers is that of a vision-language model whose text part can be quantized."""
    return family(config) in VISION_LANGUAGE


def refuse_unsupported(config: Any, directory: Path) -> None:
    """Refuse a model whose config alone shows that it cannot be quantized.

    Args:
        config: of transformers.
        directory: of the model, for the message.

    Raises:
        CalibrationError: it is multimodal, and its text part cannot be quantized by itself.
    """
    if has_vision(config):
        return
    for key in OTHER_INPUTS:
        if getattr(config, key, None):
            raise CalibrationError(f"{directory}: this {family(config)} model is multimodal ({key}). {SUPPORTED}")


def no_layers(blocks: Sequence[nn.Module], family: str) -> str:
    """What is wrong with a model that has no layer to quantize.

    Args:
        blocks: its decoder blocks.
        family: which kind of model it is.
    """
    names = [name for name, module in blocks[0].named_modules() if isinstance(module, nn.Linear)]
    if not names:
        return f"the decoder blocks of this {family} model have no torch.nn.Linear."
    return f"the linear layers of this {family} model ({', '.join(names)}) have none of the names that are known."
