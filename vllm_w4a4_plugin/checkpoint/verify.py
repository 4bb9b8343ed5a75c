# SPDX-License-Identifier: Apache-2.0
"""Every check that a checkpoint must pass before it is served; loading makes the same ones."""

from collections.abc import Callable, Iterator
from functools import partial

from .accounting import header_accounting, rotation_findings
from .errors import CheckpointError
from .inventory import Inventory
from .model_config import EMBEDDING, HEAD, config_findings, is_tied
from .plan import plan_layer
from .reader import CheckpointReader
from .resolve import USUALLY_FUSED, module_type
from .runnable import Kind, kind_of, unsupported_reason
from .spec import check_values, merge_clip_ratios
from .types import CLIP_RATIO, LEFT_TRANS, RIGHT_TRANS, WEIGHT, QuantType


def check_headers(reader: CheckpointReader) -> Inventory:
    """Check description, config, index and tensor headers.

    Raises:
        CheckpointError: the first finding, and how many more there are.
    """
    findings = list(header_findings(reader))
    if findings:
        more = f" (and {len(findings) - 1} more: run `vllm-w4a4 verify {reader.directory}`)" if findings[1:] else ""
        raise CheckpointError(findings[0] + more)
    return Inventory.of(reader)


def header_findings(reader: CheckpointReader) -> Iterator[str]:
    """Everything wrong with a checkpoint that its description, config, index and headers show; one text each."""
    try:
        inventory = Inventory.of(reader)
    except CheckpointError as error:
        yield str(error)
        return
    yield from rotation_findings(inventory.description)
    yield from header_accounting(inventory, reader.directory)
    yield from config_findings(inventory, reader.directory)
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
        yield from _fused_value_findings(reader, inventory, shards)
    yield from tied_head_findings(reader, inventory)


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


def tied_head_findings(reader: CheckpointReader, inventory: Inventory) -> Iterator[str]:
    """An output head that the model would not use, because config.json ties it to an embedding that is not equal."""
    head = reader.tensors.get(f"{HEAD}.{WEIGHT}")
    if head is None or not is_tied(inventory.config):
        return
    for name, embedding in reader.tensors.items():
        if name.endswith(f"{EMBEDDING}.{WEIGHT}") and embedding.shape == head.shape:
            if not reader.load(name).equal(reader.load(head.name)):
                yield (
                    f"{head.file}: tensor {head.name} differs from {name}, but config.json ties the output head to the "
                    "embedding (tie_word_embeddings), so the head would not be used. Set tie_word_embeddings to false "
                    "if the head was trained by itself."
                )
            return


def _fused_layers(inventory: Inventory) -> dict[str, list[str]]:
    """Names of the layers that vLLM's decoder models make of several modules -> those modules."""
    modules = set(linear_modules(inventory))
    layers = {}
    for fused, leaves in USUALLY_FUSED.items():
        for name in sorted(modules):
            parent, _, leaf = name.rpartition(".")
            shards = [f"{parent}.{other}" for other in leaves]
            if leaf == leaves[0] and modules.issuperset(shards) and kind_of(name) is Kind.LINEAR:
                layers[f"{parent}.{fused}"] = shards
    return layers


def _check_layer(name: str, inventory: Inventory) -> None:
    plan = plan_layer(name, inventory, {})
    if reason := unsupported_reason(name, plan.quant_type, kind_of(name)):
        raise CheckpointError(reason)


def _fused_value_findings(reader: CheckpointReader, inventory: Inventory, shards: list[str]) -> Iterator[str]:
    if not module_type(inventory.description, shards[0]).spec.has_transform:
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
