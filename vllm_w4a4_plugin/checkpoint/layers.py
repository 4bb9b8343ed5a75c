# SPDX-License-Identifier: Apache-2.0
"""The layers of a checkpoint, each with what keeps it from being served."""

from collections.abc import Iterator
from dataclasses import dataclass

from .errors import CheckpointError
from .inventory import Inventory
from .packed import matrix_shape
from .plan import LayerPlan, plan_layer
from .resolve import USUALLY_FUSED
from .runnable import ON_CPU, Kind, kind_of, unsupported_reason
from .types import WEIGHT, QuantType


@dataclass(frozen=True)
class LayerState:
    """A module with a weight matrix.

    Attributes:
        name: in the files.
        written_type: as the description spells it, known or not.
        kind: what it is.
        shape: of its weight matrix; empty if that is not stored.
        plan: None if `fault` says why there is none.
        fault: what is wrong with its description and headers, "" if nothing is.
        unsupported: why nothing runs it, "" if something does.
    """

    name: str
    written_type: str
    kind: Kind
    shape: tuple[int, ...]
    plan: LayerPlan | None
    fault: str = ""
    unsupported: str = ""


def layer_states(inventory: Inventory, backends: frozenset[str] = ON_CPU) -> Iterator[LayerState]:
    """All layers, in the order of the description.

    Args:
        inventory: of the checkpoint.
        backends: that may run them.
    """
    for name in linear_modules(inventory):
        weight = inventory.module(name).get(WEIGHT)
        written, kind = inventory.description.modules[name], kind_of(name)
        shape = weight.shape if weight is not None else ()
        try:
            plan = plan_layer(name, inventory, {})
        except CheckpointError as error:
            yield LayerState(name, written, kind, shape, None, fault=str(error))
            continue
        shape = matrix_shape(inventory.module(name), plan.quant_type)
        unsupported = unsupported_reason(name, plan.quant_type, kind, plan.spec, backends)
        yield LayerState(name, written, kind, shape, plan, unsupported=unsupported)


def linear_modules(inventory: Inventory) -> list[str]:
    """Modules that are linear layers: quantized, or FLOAT with a two-dimensional weight other than an embedding.

    Those that the model is served without are left out.
    """
    names = []
    for name, written in inventory.description.modules.items():
        info = inventory.module(name).get(WEIGHT)
        is_matrix = info is not None and len(info.shape) == 2 and kind_of(name) is not Kind.EMBEDDING
        if (is_matrix or written != QuantType.FLOAT) and not inventory.is_useless(f"{name}.{WEIGHT}"):
            names.append(name)
    return names


def fused_layers(inventory: Inventory) -> dict[str, list[str]]:
    """Names of the layers that vLLM's decoder models make of several modules -> those modules."""
    modules = set(linear_modules(inventory))
    layers = {}
    for fused, leaves in USUALLY_FUSED.items():
        for name in sorted(modules):
            parent, _, leaf = name.rpartition(".")
            shards = [f"{parent}.{other}" for other in leaves]
            if leaf == leaves[0] and modules.issuperset(shards) and kind_of(name) in (Kind.LINEAR, Kind.VISION):
                layers[f"{parent}.{fused}"] = shards
    return layers
