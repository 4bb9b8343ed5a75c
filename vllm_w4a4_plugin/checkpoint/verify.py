# SPDX-License-Identifier: Apache-2.0
"""Every check that a checkpoint must pass before it is served."""

from collections.abc import Callable, Iterator
from functools import partial

from .errors import CheckpointError
from .plan import USUALLY_FUSED, Inventory, plan_layer
from .reader import CheckpointReader
from .resolve import module_type
from .spec import check_values, merge_clip_ratios, unsupported_type
from .types import CLIP_RATIO, CPU, LEFT_TRANS, RIGHT_TRANS, WEIGHT, QuantType


def check_headers(reader: CheckpointReader) -> None:
    """Check description, index and tensor headers.

    Raises:
        CheckpointError: the first finding, and how many more there are.
    """
    findings = list(header_findings(reader))
    if findings:
        more = f" (and {len(findings) - 1} more: run `vllm-w4a4 verify {reader.directory}`)" if findings[1:] else ""
        raise CheckpointError(findings[0] + more)


def header_findings(reader: CheckpointReader) -> Iterator[str]:
    """Everything wrong with a checkpoint that its description, index and headers show; one text each."""
    try:
        inventory = Inventory.of(reader)
    except CheckpointError as error:
        yield str(error)
        return
    described, stored = inventory.description.tensors, inventory.tensors
    for name in described:
        if name not in stored:
            yield (
                f"{reader.directory}: tensor {name} is described as {described[name]} but is in none of the weight "
                "files. The copy is incomplete, or description and weights come from different runs."
            )
    for name, info in stored.items():
        if name not in described:
            yield (
                f"{info.file}: tensor {name} has no entry in {reader.directory.name}/quant_model_description.json. "
                "Description and weights come from different runs; copy the whole directory again."
            )
    faulty: set[str] = set()
    for name in linear_modules(inventory):
        for finding in _caught(partial(_check_layer, name, inventory)):
            faulty.add(name)
            yield finding
    for prefix, shards in _fused_layers(inventory).items():
        if not faulty.intersection(shards):
            yield from _caught(partial(plan_layer, prefix, inventory, USUALLY_FUSED))


def value_findings(reader: CheckpointReader, progress: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Everything wrong with the values of a checkpoint whose headers are in order; reads one tensor at a time."""
    inventory = Inventory.of(reader)
    for name in linear_modules(inventory):
        kind = module_type(inventory.description, name)
        for described in kind.spec.tensors:
            tensor = f"{name}.{described.suffix}"
            if described.check is not None and tensor in reader.tensors:
                if problem := check_values(described.suffix, reader.load(tensor), kind):
                    yield f"{reader.tensors[tensor].file}: layer {name}, tensor {tensor}: {problem}"
                progress()
    for shards in _fused_layers(inventory).values():
        yield from _fused_value_findings(reader, shards)


def linear_modules(inventory: Inventory) -> list[str]:
    """Modules that are linear layers: quantized, or FLOAT with a two-dimensional weight other than an embedding."""
    names = []
    for name, written in inventory.description.modules.items():
        info = inventory.module(name).get(WEIGHT)
        is_matrix = info is not None and len(info.shape) == 2 and "embed" not in name
        if is_matrix or written != QuantType.FLOAT:
            names.append(name)
    return names


def _fused_layers(inventory: Inventory) -> dict[str, list[str]]:
    """Names of the layers that vLLM's decoder models make of several modules -> those modules."""
    modules = set(linear_modules(inventory))
    layers = {}
    for fused, leaves in USUALLY_FUSED.items():
        for name in sorted(modules):
            parent, _, leaf = name.rpartition(".")
            shards = [f"{parent}.{other}" for other in leaves]
            if leaf == leaves[0] and modules.issuperset(shards):
                layers[f"{parent}.{fused}"] = shards
    return layers


def _check_layer(name: str, inventory: Inventory) -> None:
    plan = plan_layer(name, inventory, {})
    if CPU not in plan.quant_type.spec.runs_on:
        raise CheckpointError(unsupported_type(name, plan.quant_type))


def _fused_value_findings(reader: CheckpointReader, shards: list[str]) -> Iterator[str]:
    if not module_type(reader.description, shards[0]).spec.has_transform:
        return
    for suffix in (LEFT_TRANS, RIGHT_TRANS):
        names = [f"{name}.{suffix}" for name in shards if f"{name}.{suffix}" in reader.tensors]
        for name in names[1:]:
            if not reader.load(names[0]).equal(reader.load(name)):
                yield f"tensors {names[0]} and {name} differ, but their layers are computed as one matrix product"
    clips = {f"{name}.{CLIP_RATIO}": reader.load(f"{name}.{CLIP_RATIO}").item() for name in shards}
    yield from _caught(partial(merge_clip_ratios, clips))


def _caught(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except CheckpointError as error:
        yield str(error)
