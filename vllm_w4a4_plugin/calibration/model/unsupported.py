# SPDX-License-Identifier: Apache-2.0
"""Models that cannot be quantized, named by what they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CalibrationError

SUPPORTED = "Only dense language models of the Llama, Qwen2, Qwen3 and Mistral families can be quantized."
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
OTHER_INPUTS = ("vision_config", "audio_config")


def family(config: Any) -> str:
    """The kind of model that a config of transformers is of, as config.json spells it."""
    return getattr(config, "model_type", "") or type(config).__name__


def refuse_unsupported(config: Any, directory: Path) -> None:
    """Refuse a model whose config alone shows that it cannot be quantized.

    Args:
        config: of transformers.
        directory: of the model, for the message.

    Raises:
        CalibrationError: it is a mixture of experts, or multimodal.
    """
    for key in OTHER_INPUTS:
        if getattr(config, key, None):
            raise CalibrationError(f"{directory}: this {family(config)} model is multimodal ({key}). {SUPPORTED}")
    text = config.get_text_config()
    for key in EXPERTS:
        count = getattr(text, key, None)
        if isinstance(count, int) and count > 1:
            raise CalibrationError(
                f"{directory}: this {family(config)} model is a mixture of experts ({key} = {count}). {SUPPORTED}"
            )


def what_differs(groups: Sequence[Sequence[str]]) -> str:
    """What tells a block from those that can be quantized, as the beginning of a sentence; empty if not known.

    Args:
        groups: names of linear layers with a common input, in order of execution.
    """
    sizes = [len(members) for members in groups]
    found = []
    if not groups:
        found.append("it has no torch.nn.Linear")
    if len(sizes) > 1 and sizes[0] == 1:
        found.append(f"q, k and v are one matrix ({groups[0][0]})")
    if len(sizes) > 1 and sizes[0] > 3:
        found.append("attention and MLP have one input")
    if sizes[-2:] == [1, 1] and len(sizes) == 4:
        fused = groups[2][0]
        found.append(f"gate and up are one matrix ({fused})" if "gate" in fused else f"the MLP has no gate ({fused})")
    return f"{', and '.join(found)}; " if found else ""
