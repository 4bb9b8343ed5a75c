# SPDX-License-Identifier: Apache-2.0
"""The groups of linear layers in a decoder block, as data, and their sizes. Imports no torch."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

EXPERT_LEAVES = ("gate_proj", "up_proj", "down_proj")
"""Last parts of the names of the linear layers of an expert."""


class Role(StrEnum):
    """What the layers of a group are for, in order of execution: recipes give each of these a quant type."""

    QKV = "qkv"
    O = "o"  # noqa: E741 - the field's name
    GATE_UP = "gate_up"
    DOWN = "down"


@dataclass(frozen=True)
class Source:
    """Output channels of an earlier linear layer in which a group's input is linear.

    Attributes:
        linear: name of that layer within the block: v for o, up for down, or a layer that holds them.
        start: the first of the channels.
        channels: how many there are.
        head_dim: channels per head. Where there are fewer channels than the group has inputs, a head is read by several
            neighbouring heads of the input (grouped-query attention).
        mixes: whether a matrix over the channels of a head commutes with what lies between, and not only factors of
            single channels.
    """

    linear: str
    start: int
    channels: int
    head_dim: int
    mixes: bool = False

    def of_input(self, input_size: int) -> list[int]:
        """For each input channel of the group, the source's channel that it is linear in, counted from `start`."""
        repeats = input_size // self.channels
        return [c // self.head_dim // repeats * self.head_dim + c % self.head_dim for c in range(input_size)]


@dataclass(frozen=True)
class Group:
    """Linear layers with one common input, which get one transform.

    Attributes:
        role: what they are for.
        linears: names within the block, in order of execution.
        norm: name of the norm whose output is the input and whose weight takes the diagonal, None if there is none.
        source: what takes the part of the transform that is not computed online, None if nothing does.
        norm_offset: the norm multiplies by weight + norm_offset (Gemma: 1).
        number: counts the block's groups of this role from 1.
        note: why there is no diagonal, for the report; "" where there is one.
    """

    role: Role
    linears: tuple[str, ...]
    norm: str | None = None
    source: Source | None = None
    norm_offset: float = 0.0
    number: int = 1
    note: str = field(default="", compare=False)

    @property
    def key(self) -> str:
        """Names the group within its block."""
        return str(self.role) if self.number == 1 else f"{self.role}-{self.number}"


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block, which vLLM computes as one layer.

    Their gate and up projections share the input and so one transform; each down projection has an input of its own.

    Attributes:
        name: of their module within the block.
        count: how many there are.
    """

    name: str
    count: int

    def linears(self, expert: int) -> tuple[str, str, str]:
        """Names within the block of an expert's gate, up and down projections."""
        gate, up, down = (f"{self.name}.{expert}.{leaf}" for leaf in EXPERT_LEAVES)
        return gate, up, down

    @property
    def gate_and_up(self) -> tuple[str, ...]:
        """Names within the block of the gate and up projections of all experts."""
        return tuple(name for expert in range(self.count) for name in self.linears(expert)[:2])

    @property
    def all_linears(self) -> tuple[str, ...]:
        """Names within the block of all projections, expert by expert."""
        return tuple(name for expert in range(self.count) for name in self.linears(expert))


def group_sizes(config: Any) -> dict[Role, tuple[int, int]]:
    """(output_size, input_size) of each group's layers together, from transformers' text config."""
    hidden, mlp, head = config.hidden_size, config.intermediate_size, head_dim(config)
    heads, kv = config.num_attention_heads * head, kv_heads(config) * head
    return {
        Role.QKV: (heads + 2 * kv, hidden),
        Role.O: (hidden, heads),
        Role.GATE_UP: (2 * mlp, hidden),
        Role.DOWN: (hidden, mlp),
    }


def kv_heads(config: Any) -> int:
    """Number of heads of keys and values."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_dim(config: Any) -> int:
    """Size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
