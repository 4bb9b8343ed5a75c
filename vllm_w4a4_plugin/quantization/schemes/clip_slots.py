# SPDX-License-Identifier: Apache-2.0
"""Clip ratios in the slots of npu_kronecker_quant, which captured graphs contain as numbers."""

from vllm.config import CUDAGraphMode, get_current_vllm_config_or_none

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.ops.npu import cann


def captures_graphs() -> bool:
    """Whether vLLM will capture graphs of the model that it is creating."""
    config = get_current_vllm_config_or_none()
    return bool(config) and config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)


def set_clip_ratio(prefix: str, slot: int, value: float, is_captured: bool) -> None:
    """Set the clip ratio of a layer.

    Args:
        prefix: of the layer.
        slot: from `cann.new_clip_slot`.
        value: in (0, 1].
        is_captured: whether graphs may contain the former one.

    Raises:
        CheckpointError: they do, and it was another.
    """
    before = cann.clip_ratio(slot)
    if is_captured and before not in (None, value):
        raise CheckpointError(
            f"layer {prefix}: the new weights have clip_ratio {value:.6f}, but captured graphs contain "
            f"that of the old ones, {before:.6f}. Restart vLLM with the new weights, or with --enforce-eager."
        )
    cann.set_clip_ratio(slot, value)
