# SPDX-License-Identifier: Apache-2.0
"""What quantizing a model will need, estimated before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from vllm_w4a4_plugin.checkpoint import TensorInfo
from vllm_w4a4_plugin.checkpoint.model_config import layer_number

from ..block.moments import TOKENS_AT_ONCE
from ..block.rounding import DOUBLE_UP_TO
from ..data.self_generated_text import ROW_TOKENS, ROWS_AT_ONCE
from ..distill.schedule import STEP_TOKENS
from ..model.structure import group_sizes, head_dim
from ..recipe import Recipe

PROCESS_BYTES = 700 * 2**20  # Python, torch and transformers
FLOAT = 4  # bytes
WEIGHT_COPIES = 6  # of one group's weights: original, transformed, refitted, and three in rounding
MOMENTS = 4  # matrices [n, n] alive at once: the Hessian, the cross moment and two in rounding
INPUT_COPIES = 4  # of a slice of one group's input: original, transformed, quantized, weighted
KEPT, KEPT_WIDE = 40, 12  # activations as wide as the model and as its MLP that a block keeps for the backward pass
LOGIT_COPIES = 3  # of one step's logits while the model generates text
GENERATION_FACTOR = 2  # a generated token takes as long as so many tokens in a forward pass
FLOPS_PER_SECOND = {"cpu": 60e9, "cuda": 20e12, "npu": 20e12}


@dataclass(frozen=True)
class Workload:
    """What a run does with how many tokens.

    Attributes:
        tokens: of calibration text.
        gradients: whether tokens are weighted by gradients.
        distill: tokens of distillation, over all steps.
        generated: tokens that the model generates first.
        activations_on_disk: whether activations are kept in files.
    """

    tokens: int
    gradients: bool = False
    distill: int = 0
    generated: int = 0
    activations_on_disk: bool = False


@dataclass(frozen=True)
class Budget:
    """Peak memory and peak disk space in bytes, time in seconds."""

    memory: float
    disk: float
    seconds: float

    def __str__(self) -> str:
        minutes = self.seconds / 60
        time = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{minutes:.0f} min"
        return f"about {self.memory / 1e9:.1f} GB of memory, {self.disk / 1e9:.1f} GB of disk, {time}"


def estimate(
    config: Any, tensors: Mapping[str, TensorInfo], recipe: Recipe, workload: Workload, device: str = "cpu"
) -> Budget:
    """The budget of one run.

    Args:
        config: transformers' text config.
        tensors: headers of the float model.
        recipe: says which inputs need moments.
        workload: what is done.
        device: "cpu", "cuda" or "npu", with or without a number.
    """
    model = _Sizes(config, tensors)
    memory = max(
        _quantizing_memory(model, recipe, workload),
        _training_memory(model, workload),
        _generating_memory(model, workload, device),
    )
    flops_per_second = FLOPS_PER_SECOND.get(device.split(":")[0], FLOPS_PER_SECOND["cpu"])
    return Budget(memory, _disk(model, recipe, workload), _flops(model, recipe, workload) / flops_per_second)


class _Sizes:
    """Sizes of a model: of one block's groups, of one block in parameters, of everything else in stored bytes."""

    def __init__(self, config: Any, tensors: Mapping[str, TensorInfo]) -> None:
        outer = [tensor for name, tensor in tensors.items() if ".layers." not in name]
        self.hidden, self.layers, self.mlp = config.hidden_size, config.num_hidden_layers, config.intermediate_size
        self.groups = group_sizes(config)
        self.block = max(sum(out * n for out, n in self.groups.values()), _largest_block(tensors))
        self.experts = _largest_block({name: tensor for name, tensor in tensors.items() if ".experts." in name})
        self.expert_width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        self.experts_per_token = getattr(config, "num_experts_per_tok", None) or 1
        self.kv = config.num_key_value_heads * head_dim(config)
        self.outer_bytes = sum(tensor.nbytes for tensor in outer)
        self.outer_parameters = sum(prod(tensor.shape) for tensor in outer)
        self.vocabulary = max((tensor.shape[0] for tensor in outer if len(tensor.shape) == 2), default=0)

    def four_bits(self, recipe: Recipe) -> list[tuple[int, int]]:
        """(output_size, input_size) of the groups that a recipe quantizes to 4 bits."""
        return [self.groups[role] for role, kind in recipe.types.items() if kind.spec.weight_bits == 4]

    def activation_bytes(self, tokens: int) -> int:
        """Of what is kept of one block: outputs of its layers, its input and output, and the widest input."""
        outputs = sum(out for out, _ in self.groups.values())
        return FLOAT * tokens * (outputs + 2 * self.hidden + max(n for _, n in self.groups.values()))

    def stored_block(self, recipe: Recipe) -> int:
        """Bytes of one quantized block: int4 values in int8, float values in 16 bits."""
        experts = self.experts * (1 if recipe.experts.spec.is_quantized else 2)
        return experts + sum(
            out * n * (1 if recipe.types[role].spec.is_quantized else 2) for role, (out, n) in self.groups.items()
        )

    def expert_flops(self, tokens: int) -> float:
        """Of rounding the experts of one block to 4 bits."""
        rows_of_gate_up, rows_of_down = (2 * self.experts / (3 * self.hidden), self.experts / (3 * self.expert_width))
        pairs = tokens * self.experts_per_token
        return self.hidden**2 * (6 * pairs + 8 * rows_of_gate_up) + self.expert_width**2 * (
            6 * pairs + 8 * rows_of_down
        )


def _largest_block(tensors: Mapping[str, TensorInfo]) -> int:
    """Parameters of the largest block in the files, with experts and whatever else is no layer with a role."""
    blocks: dict[int, int] = {}
    for name, tensor in tensors.items():
        if (number := layer_number(name)) is not None:
            blocks[number] = blocks.get(number, 0) + prod(tensor.shape)
    return max(blocks.values(), default=0)


def _quantizing_memory(model: _Sizes, recipe: Recipe, workload: Workload) -> float:
    tokens = min(workload.tokens, TOKENS_AT_ONCE)
    group = max((_group_bytes(out, n, tokens) for out, n in model.four_bits(recipe)), default=0)
    activations = 0 if workload.activations_on_disk else model.activation_bytes(workload.tokens)
    codes = model.experts if recipe.experts.spec.is_quantized else 0  # of all experts, a byte each
    return PROCESS_BYTES + model.outer_bytes + FLOAT * model.block + codes + group + activations


def _training_memory(model: _Sizes, workload: Workload) -> float:
    """Of gradients and distillation."""
    head = FLOAT * model.vocabulary * model.hidden if workload.gradients or workload.distill else 0
    kept_per_block = model.block + STEP_TOKENS * (KEPT * model.hidden + KEPT_WIDE * model.mlp)
    blocks = model.layers * kept_per_block if workload.distill else 0
    return PROCESS_BYTES + model.outer_bytes + head + FLOAT * blocks


def _generating_memory(model: _Sizes, workload: Workload, device: str) -> float:
    if not workload.generated:
        return 0
    entry = FLOAT if device.startswith("cpu") else FLOAT // 2
    rows = min(ROWS_AT_ONCE, -(-workload.generated // ROW_TOKENS))
    weights = model.layers * model.block + model.outer_parameters
    keys_and_values = 2 * model.layers * model.kv * rows * ROW_TOKENS
    return PROCESS_BYTES + entry * (weights + keys_and_values) + LOGIT_COPIES * FLOAT * model.vocabulary * rows


def _disk(model: _Sizes, recipe: Recipe, workload: Workload) -> float:
    stored, stream = model.layers * model.stored_block(recipe), FLOAT * workload.tokens * model.hidden
    disk = 2 * (stored + model.outer_bytes) + 2 * stream + stored * bool(workload.distill)
    disk += (model.layers + 2) * stream * workload.gradients
    return disk + model.activation_bytes(workload.tokens) * workload.activations_on_disk


def _flops(model: _Sizes, recipe: Recipe, workload: Workload) -> float:
    tokens, distill = workload.tokens, workload.distill
    passes = tokens * (1.5 + 4 * workload.gradients) + min(tokens, distill) + 2 * distill
    flops = 2 * model.layers * model.block * (passes + GENERATION_FACTOR * workload.generated)
    flops += model.layers * sum(n * n * (6 * tokens + 8 * out) for out, n in model.four_bits(recipe))
    if model.experts and recipe.experts.spec.weight_bits == 4:
        flops += model.layers * model.expert_flops(tokens)
    return flops + 2 * model.vocabulary * model.hidden * 3 * (tokens * workload.gradients + distill)


def _group_bytes(output_size: int, input_size: int, tokens: int) -> int:
    """Peak of quantizing a group of layers to 4 bits, `tokens` tokens at a time."""
    entry = FLOAT if input_size > DOUBLE_UP_TO else 2 * FLOAT
    weights, moments = WEIGHT_COPIES * output_size * input_size, MOMENTS * input_size * input_size
    return FLOAT * weights + entry * moments + FLOAT * INPUT_COPIES * tokens * input_size


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
