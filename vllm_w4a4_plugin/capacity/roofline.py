# SPDX-License-Identifier: Apache-2.0
"""Lower bounds for the time of a step: bytes / bandwidth or operations / the cube's rate, whichever is larger."""

from dataclasses import dataclass

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.runnable import Kind, kind_of
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec

from .devices import Device
from .memory import Memory
from .model import Model
from .partition import sizes_on_rank


@dataclass(frozen=True)
class StepTime:
    """Lower bounds for one step on each device, in seconds, without communication and attention's matrix products.

    Attributes:
        tokens: number of tokens in the step.
        sequences: number of sequences that they belong to.
        linears: of the decoder's linear layers, without transforms.
        head: of the output head, for one token of each sequence.
        kv_cache: for reading the KV cache of the sequences.
    """

    tokens: int
    sequences: int
    linears: float
    head: float
    kv_cache: float

    @property
    def total(self) -> float:
        """Of the whole step."""
        return self.linears + self.head + self.kv_cache


def linear_time(quant_type: QuantType, output_size: int, input_size: int, tokens: float, device: Device) -> float:
    """Seconds of one product of [tokens, input_size] with a weight [output_size, input_size]."""
    weight_bytes = min(1, tokens) * output_size * input_size * quant_type.spec.weight_bits / 8
    operations = 2 * tokens * output_size * input_size
    return max(weight_bytes / device.bandwidth, operations / device.operations(quant_type.spec.activation_bits))


def step_time(model: Model, device: Device, memory: Memory, ranks: int, tokens: int, context: int) -> StepTime:
    """Bounds for a step in which each of `tokens` sequences of `context` tokens gets one more.

    If the KV cache does not hold so many sequences, the step is the prompt of one sequence.
    """
    sequences = tokens if tokens * context <= memory.kv_tokens else 1

    def time_of(linear: LinearSpec, tokens: float = tokens) -> float:
        if kind_of(linear.name) is Kind.EXPERTS:
            tokens *= model.experts_per_token / model.experts  # on average; an expert without a token is not read
        return linear_time(linear.quant_type, *sizes_on_rank(linear, model, ranks), tokens, device)

    head = model.head or LinearSpec("lm_head", QuantType.FLOAT, *model.embedding)
    return StepTime(
        tokens,
        sequences,
        sum(map(time_of, model.decoder_linears)),
        time_of(head, sequences),
        sequences * context * memory.kv_per_token / device.bandwidth,
    )
