# SPDX-License-Identifier: Apache-2.0
"""The routed experts of one layer, which vLLM computes as one: their plan, and what must be the same in all of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .agreement import SHARED, agreeing_spec
from .errors import CheckpointError, in_file
from .inventory import Inventory
from .plan import LayerPlan, plan_layer
from .resolve import resolve_experts, spellings
from .runnable import ON_CPU, Kind, unsupported_reason
from .spec import LinearSpec
from .types import NPU, WEIGHT

EXPERTS = "experts"
PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""How checkpoints name the three matrices of an expert."""


@dataclass(frozen=True)
class ExpertsPlan(LayerPlan):
    """The routed experts of one layer.

    `shards` names the modules gate, up and down of expert 0, then those of expert 1, and so on. `spec` is that of gate
    and up, which all experts agree in; both are None for FLOAT experts.

    Attributes:
        down_spec: what the down projections of all experts agree in.
    """

    down_spec: LinearSpec | None = None

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.shards) // 3

    @property
    def gate_and_up(self) -> tuple[str, ...]:
        """Names in the files of the modules that share the input and its transform."""
        return tuple(name for index, name in enumerate(self.shards) if index % 3 != 2)


def plan_experts(
    prefix: str, inventory: Inventory, sizes: tuple[int, int] | None = None, backends: frozenset[str] = ON_CPU
) -> ExpertsPlan:
    """The plan of the experts below `prefix` (`...mlp.experts`).

    Args:
        prefix: as vLLM spells it.
        inventory: of the checkpoint.
        sizes: (hidden, intermediate), used where the checkpoint has no weights to read them from.
        backends: that may run them.

    Raises:
        CheckpointError: an expert or a projection is missing, they differ in type or shape, a tensor's header is wrong,
            or nothing here runs such experts.
    """
    quant_type = resolve_experts(inventory.description, prefix)
    leaves, count = _projections(prefix, inventory)
    names = [f"{prefix}.{number}.{leaf}" for number in range(count) for leaf in leaves]
    hidden, intermediate = sizes or (0, 0)
    shapes = ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden))
    plans = [plan_layer(name, inventory, {}, shapes[index % 3] if sizes else None) for index, name in enumerate(names)]
    shards = tuple(plan.shards[0] for plan in plans)
    files = {tensor: file for plan in plans for tensor, file in plan.files.items()}
    weight_bytes = sum(plan.weight_bytes for plan in plans)
    if not quant_type.spec.is_quantized:
        return ExpertsPlan(prefix, quant_type, shards, files=files, weight_bytes=weight_bytes)
    if reason := unsupported_reason(prefix, quant_type, Kind.EXPERTS, backends=backends):
        raise CheckpointError(reason)
    specs = [plan.spec for plan in plans if plan.spec is not None]
    if len(specs) < len(plans):
        raise CheckpointError(f"layer {prefix}: the sizes of its experts are not known, because there are no weights.")
    gate_up = agreeing_spec(
        prefix, [spec for index, spec in enumerate(specs) if index % 3 != 2], inventory.tensors, _SHARED
    )
    down = agreeing_spec(prefix, specs[2::3], inventory.tensors, _SHARED)
    for spec in (gate_up, down):
        if reason := unsupported_reason(spec.name, quant_type, Kind.EXPERTS, spec, backends):
            raise CheckpointError(reason)
    if (down.output_size, down.input_size) != (gate_up.input_size, gate_up.output_size):
        info = inventory.tensors.get(f"{down.name}.{WEIGHT}")
        raise CheckpointError(
            f"{in_file(info.file if info else '')}layer {prefix}, tensor {down.name}.{WEIGHT}: expected shape "
            f"[{gate_up.input_size}, {gate_up.output_size}], the transpose of {gate_up.name}.{WEIGHT}, found "
            f"[{down.output_size}, {down.input_size}]. The experts come from different models; copy or quantize the "
            "model again."
        )
    return ExpertsPlan(prefix, quant_type, shards, gate_up, files, weight_bytes=weight_bytes, down_spec=down)


def undividable_experts(layer: str, count: int, ranks: int) -> str:
    """Why `count` experts of a layer cannot be served by so many expert-parallel ranks, "" if they can."""
    if count % ranks == 0:
        return ""
    return (
        f"layer {layer}: expected a number of expert-parallel ranks that divides the {count} experts, found {ranks}. "
        "Use another --tensor-parallel-size, or no --enable-expert-parallel."
    )


def experts_layers(inventory: Inventory) -> list[str]:
    """Prefixes of all layers of experts that are described and needed, in the order of the description."""
    prefixes: dict[str, None] = {}
    for name in inventory.description.modules:
        parent, found, rest = name.partition(f".{EXPERTS}.")
        if found and rest.partition(".")[0].isdecimal() and not inventory.is_useless(f"{name}.{WEIGHT}"):
            prefixes[f"{parent}.{EXPERTS}"] = None
    return list(prefixes)


def planned_experts(inventory: Inventory, backends: frozenset[str] = ON_CPU) -> Iterator["ExpertsPlan | str"]:
    """The plan of each layer of experts, or what is wrong with it; of those that vllm-ascend runs only the latter."""
    for prefix in experts_layers(inventory):
        try:
            quant_type = resolve_experts(inventory.description, prefix)
            if backends == ON_CPU or NPU in quant_type.spec.experts_run_on & backends:
                yield plan_experts(prefix, inventory, backends=backends)
        except CheckpointError as error:
            yield str(error)


def _projections(prefix: str, inventory: Inventory) -> tuple[Sequence[str], int]:
    """Names of the projections, and the number of experts if none is missing; one more than there are if one is."""
    children = inventory.description.children
    experts = next((children[spelled] for spelled in spellings(prefix) if spelled in children), [])
    numbers = {int(name.rpartition(".")[2]) for name in experts if name.rpartition(".")[2].isdecimal()}
    leaves = {child.rpartition(".")[2] for name in experts for child in children.get(name, ())}
    names = next((names for names in PROJECTIONS if leaves.intersection(names)), PROJECTIONS[0])
    # Names are made of all of them, so a single expert of a high number must not stand for all below it.
    return names, min(max(numbers, default=-1), len(numbers)) + 1


_SHARED = {"output_size": (WEIGHT, "the number of output features"), **SHARED}
