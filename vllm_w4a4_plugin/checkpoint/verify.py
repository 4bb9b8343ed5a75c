# SPDX-License-Identifier: Apache-2.0
"""Every check that a checkpoint must pass before it is served; loading makes the same ones."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from vllm_w4a4_plugin.constants import DESCRIPTION_FILE

from .accounting import cache_findings, header_accounting, rotation_findings
from .agreement import difference_from, equal_copies, merge_clip_ratios
from .errors import DAMAGED, CheckpointError, in_file
from .experts import ExpertsPlan, planned_experts
from .fit import architectures_finding, config_findings, expert_findings, float_findings, is_compared
from .inventory import Inventory
from .layers import LayerState, fused_layers, layer_states
from .model_config import EMBEDDING, HEAD, is_tied
from .packed import is_packed
from .plan import LayerPlan, plan_layer
from .reader import CheckpointReader
from .resolve import USUALLY_FUSED
from .runnable import ON_CPU, Kind
from .types import CLIP_RATIO, VLLM_ASCEND, WEIGHT, QuantType, known_types
from .values import finite

if TYPE_CHECKING:
    import torch


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


def header_findings(reader: CheckpointReader, backends: frozenset[str] = ON_CPU) -> Iterator[str]:
    """Everything wrong with a checkpoint that its description, config, index and headers show; one text each.

    Args:
        reader: of the checkpoint.
        backends: that may run its layers.
    """
    try:
        inventory = Inventory(reader.description, reader.tensors, config=reader.config)
    except CheckpointError as error:
        yield str(error)
        return
    if finding := architectures_finding(inventory.config, reader.directory):
        yield finding
        return
    if backends == ON_CPU:
        yield from cache_findings(inventory.description)
    yield from rotation_findings(inventory.description)
    yield from header_accounting(inventory, reader.directory)
    if is_compared(inventory):
        yield from config_findings(inventory, reader.directory)
    else:
        yield from expert_findings(inventory)
    yield from float_findings(inventory)
    faulty: dict[str, str] = {}
    for layer in layer_states(inventory, backends):
        if finding := layer.fault or layer.unsupported or tied_finding(layer, inventory):
            faulty[layer.name] = finding
            yield finding
    for prefix, shards in fused_layers(inventory).items():
        if not faulty.keys() & set(shards):
            yield from _caught(partial(plan_layer, prefix, inventory, USUALLY_FUSED))
    for plan in planned_experts(inventory, backends):
        if isinstance(plan, str) and plan not in faulty.values():
            yield plan


def remarks(reader: CheckpointReader) -> Iterator[str]:
    """What could not be checked without vLLM, of a checkpoint without header findings."""
    if not is_compared(Inventory.of(reader)):
        names = ", ".join(map(str, reader.config.get("architectures") or ["without architectures in config.json"]))
        yield (
            f"names and sizes of the tensors were not compared with config.json, because the layers of this model "
            f"({names}) are not known here; loading compares them"
        )


def value_findings(reader: CheckpointReader, progress: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Everything wrong with the values of a checkpoint whose headers are in order; reads one tensor at a time."""
    inventory = Inventory.of(reader)
    for name in inventory.tensors:
        if not inventory.is_useless(name):
            if finding := value_finding(inventory, name, reader.load(name)):
                yield finding
            progress()
    yield from shared_value_findings(reader)
    yield from tied_head_findings(reader, inventory)


def shared_value_findings(reader: CheckpointReader, backends: frozenset[str] = ON_CPU) -> Iterator[str]:
    """Where parts of a layer that the plugin computes as one differ in what they must share: transforms, clip ratios.

    Args:
        reader: of a checkpoint whose headers are in order. Only the shared tensors are read, which are small.
        backends: that may run its layers.
    """
    inventory = Inventory.of(reader)
    for prefix in fused_layers(inventory):
        plan = plan_layer(prefix, inventory, USUALLY_FUSED)
        if plan.quant_type.spec.runs_on & backends - {VLLM_ASCEND}:
            yield from _differences(reader, plan)
    for experts in planned_experts(inventory, backends):
        if isinstance(experts, ExpertsPlan):
            yield from _differences(reader, replace(experts, shards=experts.gate_and_up))


def value_finding(inventory: Inventory, name: str, tensor: "torch.Tensor") -> str:
    """What is wrong with the values of one tensor, "" if nothing is. Matrices that are FLOAT are looked at too.

    Args:
        inventory: of the checkpoint, with names as in the files.
        name: of the tensor.
        tensor: its values.
    """
    module, _, suffix = name.rpartition(".")
    written = inventory.description.modules.get(module, QuantType.FLOAT.value)
    described = QuantType(written).spec.tensor(suffix) if written in known_types() else None
    check = finite if described is None else described.check
    if suffix == WEIGHT and written in known_types() and is_packed(inventory.module(module), QuantType(written)):
        check = None  # every byte is two int4 values
    problem = check(tensor) if check is not None else ""
    info = inventory.tensors.get(name)
    return f"{in_file(info.file if info else '')}layer {module}, tensor {name}: {problem}. {DAMAGED}" if problem else ""


def tied_finding(layer: LayerState, inventory: Inventory) -> str:
    """Why an output head would not be used although it is quantized, "" if it would or if the layer is none."""
    if layer.kind is not Kind.HEAD or layer.written_type == QuantType.FLOAT or not is_tied(inventory.config):
        return ""
    return (
        f"{DESCRIPTION_FILE}: layer {layer.name}: quant type {layer.written_type}, but config.json ties the output "
        "head to the embedding (tie_word_embeddings), which looks tokens up in float, so the head would not be used. "
        "Set tie_word_embeddings to false if the head belongs to these weights, or quantize again with a FLOAT head."
    )


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


def _differences(reader: CheckpointReader, plan: LayerPlan) -> Iterator[str]:
    spec = plan.quant_type.spec
    for suffix in (tensor.suffix for tensor in spec.tensors if tensor.is_shared):
        first: tuple[str, torch.Tensor] | None = None
        for index in range(len(plan.shards)):
            name = plan.tensor_name(suffix, index)
            if name not in reader.tensors:
                continue
            tensor = reader.load(name)
            if first is None:
                first = name, tensor
            elif not equal_copies(first[1], tensor):
                yield str(plan.error(suffix, index, difference_from(first[0])))
    if spec.has_transform:
        ratios = [plan.tensor_name(CLIP_RATIO, index) for index in range(len(plan.shards))]
        clips = {name: reader.load(name).float().item() for name in ratios}
        yield from _caught(partial(merge_clip_ratios, plan.prefix, clips, plan.files))


def _caught(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except CheckpointError as error:
        yield str(error)
