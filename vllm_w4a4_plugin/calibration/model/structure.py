# SPDX-License-Identifier: Apache-2.0
"""The four groups of linear layers in a dense decoder block, and their sizes."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    """The four inputs of a dense decoder block, in order of execution."""

    QKV = "qkv"
    O = "o"  # noqa: E741 - the field's name
    GATE_UP = "gate_up"
    DOWN = "down"


@dataclass(frozen=True)
class Group:
    """Linear layers with one common input.

    Attributes:
        role: which of the four inputs it is.
        linears: names within the block, in order of execution.
        norm: name of the norm whose output is the input, None if there is none.
        source: name of the linear layer in whose output the input is linear (v for o, up for down), None if none.
    """

    role: Role
    linears: tuple[str, ...]
    norm: str | None = None
    source: str | None = None


def group_sizes(config: Any) -> dict[Role, tuple[int, int]]:
    """(output_size, input_size) of each group's layers together, from transformers' text config."""
    hidden, mlp, head = config.hidden_size, config.intermediate_size, head_dim(config)
    heads, kv_heads = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        Role.QKV: (heads + 2 * kv_heads, hidden),
        Role.O: (hidden, heads),
        Role.GATE_UP: (2 * mlp, hidden),
        Role.DOWN: (hidden, mlp),
    }


def head_dim(config: Any) -> int:
    """Size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
