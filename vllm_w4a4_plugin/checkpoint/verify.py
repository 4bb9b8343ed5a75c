# SPDX-License-Identifier: Apache-2.0
"""Every check that a checkpoint must pass before it is served."""

from collections.abc import Callable, Iterator
from functools import partial

from .description import QuantType
from .errors import CheckpointError
from .layer import (
    CLIP_RATIO,
    LEFT_TRANS,
    RIGHT_TRANS,
    TENSORS_OF,
    agreeing_spec,
    check_values,
    common_clip,
    linear_spec,
    unsupported,
)
from .reader import CheckpointReader
from .resolve import module_type

USUALLY_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that vLLM's decoder models compute as one matrix product."""


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
        described, stored = reader.description.tensors, reader.tensors
    except CheckpointError as error:
        yield str(error)
        return
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
    for name in linear_modules(reader):
        yield from _caught(partial(_check_linear, reader, name))
    for group in _fused_groups(reader):
        yield from _caught(partial(_check_fused_headers, reader, group))


def value_findings(reader: CheckpointReader, progress: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Everything wrong with the values of a checkpoint whose headers are in order; reads one tensor at a time."""
    for name in linear_modules(reader):
        kind = module_type(reader.description, name)
        for suffix in TENSORS_OF[kind]:
            tensor = f"{name}.{suffix}"
            if tensor in reader.tensors:
                if problem := check_values(suffix, reader.load(tensor), kind):
                    yield f"{reader.tensors[tensor].file}: layer {name}, tensor {tensor}: {problem}"
                progress()
    for group in _fused_groups(reader):
        yield from _fused_value_findings(reader, group)


def linear_modules(reader: CheckpointReader) -> list[str]:
    """Modules that are linear layers: quantized, or FLOAT with a two-dimensional weight other than an embedding."""
    names = []
    for name in reader.description.type_names():
        info = reader.tensors.get(f"{name}.weight")
        is_matrix = info is not None and len(info.shape) == 2 and "embed" not in name
        if is_matrix or reader.description.tensors[f"{name}.weight"] != QuantType.FLOAT:
            names.append(name)
    return names


def _fused_groups(reader: CheckpointReader) -> list[list[str]]:
    modules = set(linear_modules(reader))
    groups = []
    for leaves in USUALLY_FUSED:
        for name in sorted(modules):
            parent, _, leaf = name.rpartition(".")
            group = [f"{parent}.{other}" for other in leaves]
            if leaf == leaves[0] and modules.issuperset(group):
                groups.append(group)
    return groups


def _check_linear(reader: CheckpointReader, name: str) -> None:
    quant_type = module_type(reader.description, name)
    if quant_type not in TENSORS_OF:
        raise CheckpointError(unsupported(name, quant_type))
    linear_spec(reader.tensors, name, quant_type)


def _check_fused_headers(reader: CheckpointReader, group: list[str]) -> None:
    types = {name: module_type(reader.description, name) for name in group}
    if len(set(types.values())) > 1:
        listing = ", ".join(f"{name}: {kind}" for name, kind in types.items())
        raise CheckpointError(f"layers that are computed as one matrix product differ in quant type: {listing}")
    agreeing_spec(group[0], [linear_spec(reader.tensors, name, kind) for name, kind in types.items()])


def _fused_value_findings(reader: CheckpointReader, group: list[str]) -> Iterator[str]:
    import torch

    if module_type(reader.description, group[0]) is not QuantType.W4A4_FLATQUANT_DYNAMIC:
        return
    for suffix in (LEFT_TRANS, RIGHT_TRANS):
        first, *others = (f"{name}.{suffix}" for name in group if f"{name}.{suffix}" in reader.tensors)
        for other in others:
            if not torch.equal(reader.load(first), reader.load(other)):
                yield f"tensors {first} and {other} differ, but their layers are computed as one matrix product"
    clips = {f"{name}.{CLIP_RATIO}": reader.load(f"{name}.{CLIP_RATIO}").item() for name in group}
    yield from _caught(partial(common_clip, clips))


def _caught(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except CheckpointError as error:
        yield str(error)
