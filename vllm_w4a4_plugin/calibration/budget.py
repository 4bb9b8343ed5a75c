# SPDX-License-Identifier: Apache-2.0
"""What quantizing a model will need, estimated before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from vllm_w4a4_plugin.checkpoint import QuantType, TensorInfo

from .block import TOKENS_AT_ONCE
from .distill import STEP_TOKENS
from .recipe import Recipe
from .rounding import DOUBLE_UP_TO
from .selfwrite import ROW_TOKENS, ROWS_AT_ONCE
from .structure import group_shapes, head_dim

PROCESS_BYTES = 700 * 2**20  # Python, torch and transformers
FLOAT = 4  # bytes
WEIGHTS = 6  # copies of one group's weights: as they are, transformed, refitted, and three of work
MOMENTS = 4  # matrices [n, n] alive at once: the Hessian, the cross moment and two of work
WORKED_ON = 4  # copies of a part of one group's input: as it is, transformed, rounded, weighted
KEPT, KEPT_WIDE = 40, 12  # activations, as wide as the model and its MLP, that a block keeps for the backward pass
LOGITS = 3  # copies of one step's logits of text that the model writes
SLOWER = 2  # a token written costs so many times one read
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
    config: Any,
    tensors: Mapping[str, TensorInfo],
    recipe: Recipe,
    tokens: int,
    device: str,
    *,
    gradients: bool = False,
    distill: int = 0,
    own_text: int = 0,
    on_disk: bool = False,
) -> Budget:
    """The budget of one run.

    Args:
        config: transformers' text config.
        tensors: headers of the float model.
        recipe: says which inputs need moments.
        tokens: of calibration text.
        device: "cpu", "cuda" or "npu".
        gradients: whether token weights are computed. distill: tokens of distillation.
        own_text: tokens that the model writes first.
        on_disk: whether activations are in files.
    """
    hidden, layers, shapes = config.hidden_size, config.num_hidden_layers, group_shapes(config)
    block = sum(out * n for out, n in shapes.values())
    outer = sum(t.nbytes for n, t in tensors.items() if ".layers." not in n)
    vocabulary = max(
        (t.shape[0] for t in tensors.values() if len(t.shape) == 2 and ".layers." not in t.name), default=0
    )
    four_bits = [shapes[role] for role, kind in recipe.types.items() if kind.is_w4a4]
    group = max((_group_bytes(out, n, min(tokens, TOKENS_AT_ONCE)) for out, n in four_bits), default=0)
    widths = sum(out for out, _ in shapes.values()) + 2 * hidden + max(n for _, n in shapes.values())
    activations = FLOAT * tokens * widths
    memory = PROCESS_BYTES + outer + FLOAT * block + group + (0 if on_disk else activations)
    whole_head = FLOAT * vocabulary * hidden if gradients or distill else 0
    kept = layers * (block + STEP_TOKENS * (KEPT * hidden + KEPT_WIDE * config.intermediate_size)) if distill else 0
    memory = max(memory, PROCESS_BYTES + outer + whole_head + FLOAT * kept)
    if own_text:
        entry = FLOAT if device.startswith("cpu") else FLOAT // 2
        matrices = layers * block + sum(prod(t.shape) for n, t in tensors.items() if ".layers." not in n)
        rows = min(ROWS_AT_ONCE, -(-own_text // ROW_TOKENS))
        keys = config.num_key_value_heads * head_dim(config)
        kept = matrices + 2 * layers * keys * rows * ROW_TOKENS
        memory = max(memory, PROCESS_BYTES + entry * kept + LOGITS * FLOAT * vocabulary * rows)
    stream = FLOAT * tokens * hidden
    stored = sum(out * n * (2 if recipe.types[role] is QuantType.FLOAT else 1) for role, (out, n) in shapes.items())
    disk = 2 * (layers * stored + outer) + 2 * stream + (layers + 2) * stream * gradients + activations * on_disk
    disk += layers * stored * bool(distill)
    passes = tokens * (1.5 + 4 * gradients) + min(tokens, distill) + 2 * distill
    flops = 2 * layers * block * (passes + SLOWER * own_text)
    flops += layers * sum(n * n * (6 * tokens + 8 * out) for out, n in four_bits)
    flops += 2 * vocabulary * hidden * 3 * (tokens * gradients + distill)
    return Budget(memory, disk, flops / FLOPS_PER_SECOND.get(device.split(":")[0], FLOPS_PER_SECOND["cpu"]))


def _group_bytes(out: int, n: int, tokens: int) -> int:
    """Peak of quantizing a group of layers [out, n] to 4 bits, a part of `tokens` tokens at a time."""
    entry = FLOAT if n > DOUBLE_UP_TO else 2 * FLOAT
    return FLOAT * WEIGHTS * out * n + entry * MOMENTS * n * n + FLOAT * WORKED_ON * tokens * n


def free_memory() -> int:
    """Bytes that the system could give now."""
    import psutil

    return psutil.virtual_memory().available


def free_disk(place: Path) -> int:
    """Free bytes where `place` is or will be."""
    import shutil

    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
