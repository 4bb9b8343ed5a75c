# SPDX-License-Identifier: Apache-2.0
"""What the parts of a fused layer must have in common, because one operator call has only one of it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .errors import CheckpointError, in_file
from .types import (
    BIAS,
    LEFT_TRANS,
    RIGHT_TRANS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_OFFSET_SECOND,
    WEIGHT_SCALE,
    WEIGHT_SCALE_SECOND,
)

if TYPE_CHECKING:
    import torch

    from .reader import TensorInfo
    from .spec import LinearSpec


CLIP_TOLERANCE = 1e-3
"""Relative difference up to which the clip ratios of fused layers are averaged; v1 files differ by about 1e-5."""


SHARED: Mapping[str, tuple[str, str]] = {
    "input_size": (WEIGHT, "the number of input features"),
    "groups": (WEIGHT_SCALE, "the number of weight scale groups"),
    "left": (LEFT_TRANS, "the size of left_trans"),
    "right": (RIGHT_TRANS, "the size of right_trans"),
    "has_offset": (WEIGHT_OFFSET, "the presence of weight_offset"),
    "has_bias": (BIAS, "the presence of bias"),
    "has_scale": (WEIGHT_SCALE, "the presence of weight_scale"),
    "has_second_scale": (WEIGHT_SCALE_SECOND, "the presence of weight_scale_second"),
    "has_second_offset": (WEIGHT_OFFSET_SECOND, "the presence of weight_offset_second"),
}
"""What one operator call has only one of: attribute of `LinearSpec` -> the tensor that shows it, and its name."""


def agreeing_spec(
    layer: str,
    specs: Sequence["LinearSpec"],
    tensors: Mapping[str, "TensorInfo"],
    shared: Mapping[str, tuple[str, str]] = SHARED,
) -> "LinearSpec":
    """The spec that stands for all parts of a layer that is computed as one: the first one's.

    Args:
        layer: its name, for the message.
        specs: of its parts.
        tensors: headers by tensor name; empty where there are no weights.
        shared: what must be equal.

    Raises:
        CheckpointError: it is not.
    """
    first = specs[0]
    for key, (suffix, what) in shared.items():
        for spec in specs[1:]:
            if (found := getattr(spec, key)) != (expected := getattr(first, key)):
                info = tensors.get(f"{spec.name}.{suffix}") or tensors.get(f"{first.name}.{suffix}")
                where = in_file(info.file if info else "")
                raise CheckpointError(
                    f"{where}layer {layer} is computed as one, so {what} of its parts must be equal: expected "
                    f"{expected} as in {first.name}, found {found} in {spec.name}. Quantize them again as one group."
                )
    return first


def merge_clip_ratios(layer: str, clips: Mapping[str, float], files: Mapping[str, str]) -> float:
    """The one clip ratio of layers that vLLM fuses: their mean.

    Args:
        layer: its name in vLLM.
        clips: tensor name -> clip ratio.
        files: tensor name -> the file that has it, where that is known.

    Raises:
        CheckpointError: they differ by more than `CLIP_TOLERANCE` relative to the largest.
    """
    low, high = min(clips.values()), max(clips.values())
    if high - low > CLIP_TOLERANCE * high:
        # Of many, the gate and up projections of all experts, the two that are furthest apart.
        shown = clips if len(clips) <= 4 else (min(clips, key=clips.__getitem__), max(clips, key=clips.__getitem__))
        listing = ", ".join(f"{name}: {clips[name]:.6f}" for name in shown)
        where = ", ".join(sorted({files[name] for name in shown if name in files}))
        raise CheckpointError(
            f"{in_file(where)}layer {layer}: clip ratios of layers that are computed as one matrix product differ by "
            f"more than {CLIP_TOLERANCE:g} relative, found {listing}. Quantize them again as one group."
        )
    return sum(clips.values()) / len(clips)


def difference_from(first: str) -> str:
    """What is wrong with a tensor of which `first` should be an equal copy, and is not."""
    return f"expected the same values as in {first} (vLLM computes them as one matrix product), found others"


def equal_copies(first: "torch.Tensor", second: "torch.Tensor") -> bool:
    """Whether two copies of a tensor have the same values in float32, in which they are used."""
    return first.float().flatten().equal(second.float().flatten())
