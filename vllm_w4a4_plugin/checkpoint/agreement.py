# SPDX-License-Identifier: Apache-2.0
"""What the parts of a fused layer must have in common, because one operator call has only one of it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .errors import CheckpointError

if TYPE_CHECKING:
    import torch


CLIP_TOLERANCE = 1e-3
"""Relative difference up to which the clip ratios of fused layers are averaged; v1 files differ by about 1e-5."""


def merge_clip_ratios(clips: Mapping[str, float]) -> float:
    """The one clip ratio of layers that vLLM fuses: their mean.

    Args:
        clips: tensor name -> clip ratio.

    Raises:
        CheckpointError: they differ by more than `CLIP_TOLERANCE` relative to the largest.
    """
    low, high = min(clips.values()), max(clips.values())
    if high - low > CLIP_TOLERANCE * high:
        # Of many, the gate and up projections of all experts, the two that are furthest apart.
        shown = clips if len(clips) <= 4 else (min(clips, key=clips.__getitem__), max(clips, key=clips.__getitem__))
        listing = ", ".join(f"{name}: {clips[name]:.6f}" for name in shown)
        raise CheckpointError(
            f"clip ratios of layers that are computed as one matrix product differ by more than {CLIP_TOLERANCE:g} "
            f"relative, found {listing}. Quantize them again as one group."
        )
    return sum(clips.values()) / len(clips)


def equal_copies(first: "torch.Tensor", second: "torch.Tensor") -> bool:
    """Whether two copies of a tensor have the same values in float32, in which they are used."""
    return first.float().flatten().equal(second.float().flatten())
