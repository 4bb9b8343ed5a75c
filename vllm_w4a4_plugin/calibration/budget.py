# SPDX-License-Identifier: Apache-2.0
"""What quantizing a model will need, estimated before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_w4a4_plugin.checkpoint import QuantType, TensorInfo

from .recipe import Recipe
from .structure import Role

PROCESS_BYTES = 700 * 2**20  # Python, torch and transformers
MOMENTS = 5  # matrices [n, n] alive at once in float64: Sx, Sw, their Kronecker product and two of work
ACTIVATIONS = 4  # copies of one group's input: as it is, transformed, quantized, and one of work
FLOPS_PER_SECOND = {"cpu": 60e9, "cuda": 20e12, "npu": 20e12}


@dataclass(frozen=True)
class Budget:
    """Peak memory and peak disk in bytes, time in seconds."""

    memory: float
    disk: float
    seconds: float

    def __str__(self) -> str:
        minutes = self.seconds / 60
        time = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{minutes:.0f} min"
        return f"about {self.memory / 1e9:.1f} GB of memory, {self.disk / 1e9:.1f} GB of disk, {time}"


def estimate(
    config: Any, tensors: Mapping[str, TensorInfo], recipe: Recipe, tokens: int, gradients: bool, device: str
) -> Budget:
    """The budget of one run.

    Args:
        config: transformers' text config.
        tensors: headers of the float model.
        recipe: says which inputs need moments.
        tokens: of calibration text.
        gradients: whether token weights are computed.
        device: "cpu", "cuda" or "npu".
    """
    hidden, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads * head, config.num_key_value_heads * head
    block = hidden * (2 * heads + 2 * kv_heads) + 3 * hidden * mlp
    outer = sum(t.nbytes for n, t in tensors.items() if ".layers." not in n)
    width = {Role.QKV: hidden, Role.O: heads, Role.GATE_UP: hidden, Role.DOWN: mlp}
    quantized = [width[role] for role, kind in recipe.types.items() if kind is not QuantType.FLOAT]
    largest = max(quantized, default=hidden)
    # float32 block, the part being quantized once more in float64 for the transform and once in float32 for GPTQ
    weights = 4 * block + 16 * hidden * mlp * 2
    activations = 4 * tokens * (3 * hidden + heads + 2 * kv_heads + 2 * mlp + ACTIVATIONS * largest)
    memory = PROCESS_BYTES + 2 * outer + weights + activations + MOMENTS * 8 * largest**2
    stream = 4 * tokens * hidden
    codes = layers * block + sum(4 * 3 * (2 * heads + 2 * mlp) for _ in range(layers))
    codes += layers * hidden * mlp if recipe.types[Role.DOWN] is QuantType.FLOAT else 0
    disk = 2 * (codes + outer) + 2 * stream + (layers + 2) * stream * gradients
    passes = 2 + 3 * gradients
    flops = layers * tokens * (2 * block * passes + sum(8 * n * n for n in quantized) / 1)
    return Budget(memory, disk, flops / FLOPS_PER_SECOND.get(device.split(":")[0], FLOPS_PER_SECOND["cpu"]))


def free_disk(place: Path) -> int:
    """Free bytes where `place` is or will be."""
    import shutil

    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
