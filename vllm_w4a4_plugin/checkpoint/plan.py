# SPDX-License-Identifier: Apache-2.0
"""What each layer of a model is: its type, its dimensions and where its tensors are.

The one place that decides it. Both quantization configurations, `verify` and `doctor` call `plan_layer`, so that none
of them can say something else of a checkpoint than the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .agreement import agreeing_spec
from .errors import DAMAGED, CheckpointError, in_file
from .inventory import Inventory
from .packed import matrix_shape
from .resolve import checkpoint_name, resolve, shard_names
from .spec import LinearSpec, assumed_spec, linear_spec
from .types import WEIGHT, QuantType

PackedModules = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class LayerPlan:
    """One vLLM linear layer.

    Attributes:
        prefix: its name in vLLM.
        quant_type: of all its shards.
        shards: names in the files of the modules fused into it, in order.
        spec: what its shards agree in; None where no sizes are known, and for a type that is known by name only.
        files: tensor name -> shard file, of all its tensors.
        output_sizes: rows of the weight of each shard; empty where there are no headers.
        weight_bytes: stored size of its weights.
    """

    prefix: str
    quant_type: QuantType
    shards: tuple[str, ...]
    spec: LinearSpec | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    output_sizes: tuple[int, ...] = ()
    weight_bytes: int = 0

    def tensor_name(self, suffix: str, shard: int | None = None) -> str:
        """Name in the files of the tensor that fills part `shard` of a parameter (None: the only part)."""
        return f"{self.shards[shard if shard is not None and shard < len(self.shards) else 0]}.{suffix}"

    def error(self, suffix: str, shard: int | None, problem: str) -> CheckpointError:
        """The exception for a bad tensor of this layer."""
        name = self.tensor_name(suffix, shard)
        return CheckpointError(
            f"{in_file(self.files.get(name, ''))}layer {self.prefix}, tensor {name}: {problem}. {DAMAGED}"
        )


def plan_layer(
    prefix: str, inventory: Inventory, packed_modules_mapping: PackedModules, sizes: tuple[int, int] | None = None
) -> LayerPlan:
    """The plan of one linear layer.

    Args:
        prefix: name of the layer in vLLM, e.g. `model.layers.0.self_attn.qkv_proj`.
        inventory: of the checkpoint.
        packed_modules_mapping: vLLM's own, e.g. `{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}`.
        sizes: (input_size, output_size) of the layer, used where the checkpoint has no weights to read them from.

    Raises:
        CheckpointError: the layer is not described, its shards differ, or a tensor's header is wrong.
    """
    description = inventory.description
    quant_type = resolve(description, prefix, packed_modules_mapping)
    shards = shard_names(description, prefix, packed_modules_mapping)
    modules = [checkpoint_name(description, name) or name for name in shards]
    headers = [inventory.module(module) for module in modules]
    weights = [tensors[WEIGHT] for tensors in headers if WEIGHT in tensors]
    return LayerPlan(
        prefix,
        quant_type,
        tuple(inventory.stored_name(module) for module in modules),
        _spec(prefix, quant_type, modules, inventory, sizes),
        {info.name: info.file for tensors in headers for info in tensors.values()},
        tuple(matrix_shape(tensors, quant_type)[0] for tensors in headers)
        if len(weights) == len(modules) and all(info.shape for info in weights)
        else (),
        sum(info.nbytes for info in weights),
    )


def _spec(
    prefix: str, quant_type: QuantType, modules: Sequence[str], inventory: Inventory, sizes: tuple[int, int] | None
) -> LinearSpec | None:
    if not quant_type.spec.is_described:
        return None
    if not quant_type.spec.is_quantized and not all(_is_matrix(inventory, module) for module in modules):
        return None  # a tied head has no tensor of its own, a convolution has more dimensions
    if inventory.tensors:
        specs = [linear_spec(inventory.tensors, module, quant_type) for module in modules]
    elif sizes is not None:
        specs = [assumed_spec(inventory.description, module, quant_type, *sizes) for module in modules]
    else:
        return None
    return agreeing_spec(prefix, specs, inventory.tensors)


def _is_matrix(inventory: Inventory, module: str) -> bool:
    weight = inventory.module(module).get(WEIGHT)
    return weight is not None and len(weight.shape) == 2
