# SPDX-License-Identifier: Apache-2.0
"""How tensor parallelism divides linear layers over devices."""

from typing import TYPE_CHECKING

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.runnable import Kind, kind_of
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec

if TYPE_CHECKING:
    from .model import Model

COLUMN, ROW, WHOLE, VOCABULARY = "column", "row", "whole", "vocabulary"
_SPLIT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3"), COLUMN),
    **dict.fromkeys(("o_proj", "down_proj", "w2"), ROW),
    "lm_head": VOCABULARY,
}
_KV_SHARDS = ("k_proj", "v_proj")
_LATER_SHARDS = (*_KV_SHARDS, "up_proj", "w3")

VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of this before it divides it."""


def split_of(linear: LinearSpec) -> str:
    """COLUMN, ROW, WHOLE or VOCABULARY."""
    return _SPLIT.get(linear.leaf, WHOLE)


def holds_transform(linear: LinearSpec) -> bool:
    """Whether its factors take memory; a fused layer holds those of its first shard only, which all shards share."""
    return linear.leaf not in _LATER_SHARDS


def padded_vocabulary(size: int, ranks: int) -> int:
    """Rows of the vocabulary on each of `ranks` devices."""
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // ranks


def sizes_on_rank(linear: LinearSpec, model: "Model", ranks: int) -> tuple[int, int]:
    """(output_size, input_size) of a linear layer on one of `ranks` devices.

    Raises:
        CheckpointError: it cannot be divided.
    """
    output_size, input_size, split = linear.output_size, linear.input_size, split_of(linear)
    if model.has_whole_experts and kind_of(linear.name) is Kind.EXPERTS:
        split = WHOLE
    if split == VOCABULARY:
        return padded_vocabulary(output_size, ranks), input_size
    if linear.leaf in _KV_SHARDS and ranks > model.kv_heads:
        if ranks % model.kv_heads:
            raise CheckpointError(f"{model.kv_heads} key-value heads cannot be shared evenly by {ranks} devices.")
        return output_size // model.kv_heads, input_size
    divided = {COLUMN: output_size, ROW: input_size}.get(split, ranks)
    if divided % ranks:
        raise CheckpointError(
            f"layer {linear.name}: {output_size} x {input_size} cannot be divided over {ranks} devices."
        )
    if split == COLUMN:
        return output_size // ranks, input_size
    return (output_size, input_size // ranks) if split == ROW else (output_size, input_size)
