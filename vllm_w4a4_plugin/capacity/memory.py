# SPDX-License-Identifier: Apache-2.0
"""The memory of one device: weights by type, KV cache, and the peak while weights are loaded."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_w4a4_plugin.checkpoint.spec import LinearSpec

from .devices import GIB, Device
from .model import Model
from .partition import holds_transform, padded_vocabulary, sizes_on_rank

RUNTIME_BYTES = 2 * GIB
"""Assumed, not measured: CANN's runtime and kernels, communication buffers, captured graphs."""

STAGING_BYTES = 4 << 25
"""Size of the weights that are widened to int32 at a time for packing (ops.npu.cann.PACKED_AT_ONCE)."""


@dataclass(frozen=True)
class Serving:
    """How the model will be served.

    Attributes:
        tensor_parallel_size: number of devices.
        memory_utilization: vLLM's --gpu-memory-utilization.
        max_model_len: longest sequence, tokens.
        max_num_batched_tokens: largest number of tokens in a step.
    """

    tensor_parallel_size: int = 1
    memory_utilization: float = 0.9
    max_model_len: int = 4096
    max_num_batched_tokens: int = 8192


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        weights: by quant type, with their scales and transforms; "embeddings and norms" for the rest.
        loading_peak: of the weights while they are loaded.
        unpacked_peak: the same for a loader that keeps one int4 value per byte until all weights are loaded.
        activations: of a step, estimated.
        kv_per_token: KV cache of one token.
        kv_left: what remains for the KV cache; negative if the rest alone does not fit.
    """

    weights: Mapping[str, int]
    loading_peak: int
    unpacked_peak: int
    activations: int
    kv_per_token: int
    kv_left: int

    @property
    def total_weights(self) -> int:
        """Bytes of all weights."""
        return sum(self.weights.values())

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache will hold."""
        return max(0, self.kv_left) // self.kv_per_token


def plan_memory(model: Model, device: Device, serving: Serving) -> Memory:
    """Memory of one device.

    Raises:
        CheckpointError: the model cannot be divided over so many devices.
    """
    ranks = serving.tensor_parallel_size
    weights: Counter[str] = Counter()
    unpacked = 0
    for linear in (*model.linears, *([model.head] if model.head else [])):
        weights[linear.quant_type] += resident_bytes(linear, model, ranks)
        if linear.quant_type.spec.weight_bits == 4:
            output_size, input_size = sizes_on_rank(linear, model, ranks)
            unpacked += output_size * input_size // 2
    vocabulary, hidden = model.embedding
    weights["embeddings and norms"] = 2 * padded_vocabulary(vocabulary, ranks) * hidden + model.other_bytes
    total = sum(weights.values())
    activations = _activations(model, serving)
    kv_per_token = 2 * 2 * model.layers * max(1, model.kv_heads // ranks) * model.head_dim
    budget = int(device.memory * serving.memory_utilization)
    staging = STAGING_BYTES if unpacked else 0
    return Memory(
        dict(weights),
        total + staging,
        total + unpacked,
        activations,
        kv_per_token,
        budget - total - activations - RUNTIME_BYTES,
    )


def resident_bytes(linear: LinearSpec, model: Model, ranks: int) -> int:
    """Bytes of a linear layer on one device after loading: weight, scales, offsets, transform, bias."""
    output_size, input_size = sizes_on_rank(linear, model, ranks)
    values = output_size * input_size * linear.quant_type.spec.weight_bits // 8
    bias = 2 * output_size if linear.has_bias else 0
    if not linear.quant_type.spec.is_quantized:
        return values + bias
    # W4A4: scale and offset in float32. vllm-ascend's W8A8: both in the model's dtype, and the scale in float32 too.
    scales = 8 * output_size * linear.groups
    factors = sum(2 * size**2 for size in (linear.left, linear.right) if size) if holds_transform(linear) else 0
    return values + scales + factors + bias


def _activations(model: Model, serving: Serving) -> int:
    """Of one step, 2 bytes per value: residual, normed and attention tensors, the MLP's halves and their product."""
    hidden = model.embedding[1]
    values = 8 * hidden + 3 * model.intermediate // serving.tensor_parallel_size
    return 2 * values * serving.max_num_batched_tokens
