# SPDX-License-Identifier: Apache-2.0
"""From a vLLM module's name to the quantization type that the checkpoint gives it.

Names are matched as whole dotted names, never by prefix: `mlp.gate` is not `mlp.gate_proj`.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence

from .description import QuantDescription
from .errors import CheckpointError
from .types import QuantType, known_types

WRAPPER = "language_model"
LM_HEAD = "lm_head"
SCORE = "score"


USUALLY_FUSED: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""The `packed_modules_mapping` of most of vLLM's decoder models, for where there is no vLLM to ask, and for models that
set theirs only after their first layers were made."""


def shard_names(
    description: QuantDescription, prefix: str, packed_modules_mapping: Mapping[str, Sequence[str]]
) -> list[str]:
    """Names of the checkpoint modules that vLLM's module `prefix` is made of, in order; `[prefix]` if it is one itself.

    The checkpoint may have the fused module as it is (GLM-4's `gate_up_proj`), which goes before its parts.
    """
    parent, _, leaf = prefix.rpartition(".")
    if checkpoint_name(description, prefix) is not None:
        return [prefix]
    shards = packed_modules_mapping.get(leaf) or USUALLY_FUSED.get(leaf) or [leaf]
    return [f"{parent}.{shard}" if parent else shard for shard in shards]


def spellings(name: str) -> Iterator[str]:
    """`name`, then the same name as checkpoints of wrapped models write it.

    A wrapped model's text part is `language_model.model.layers...` in one place, `model.language_model.layers...`
    in another and plain `model.layers...` where only the text part was quantized.
    """
    yield name
    parts = name.split(".")
    bare = [part for part in parts if part != WRAPPER]
    candidates = [bare, [WRAPPER, *bare]]
    if bare[0] == "model":
        candidates.append(["model", WRAPPER, *bare[1:]])
    for candidate in candidates:
        spelled = ".".join(candidate)
        if spelled != name:
            yield spelled


def checkpoint_name(description: QuantDescription, name: str) -> str | None:
    """The spelling of module `name` that the description has a weight for, None if it has none."""
    return next((s for s in spellings(name) if f"{s}.weight" in description.tensors), None)


def module_type(description: QuantDescription, name: str) -> QuantType:
    """Type of one checkpoint module.

    An absent `lm_head` is FLOAT: it is tied to the embedding. So is the `score` of a classifier that vLLM makes of a
    language model: nothing quantizes it.

    Raises:
        CheckpointError: the description has no such module, or its type is unknown.
    """
    found = checkpoint_name(description, name)
    if found is None:
        if name.rpartition(".")[2] in (LM_HEAD, SCORE):
            return QuantType.FLOAT
        raise CheckpointError(_missing(description, name))
    written = description.tensors[f"{found}.weight"]
    try:
        return QuantType(written)
    except ValueError:
        raise CheckpointError(
            f"quant_model_description.json: tensor '{found}.weight' has the unknown quant type {written!r}. "
            f"Known types: {', '.join(known_types())}. A newer plugin may know it; otherwise quantize this layer with "
            "another type."
        ) from None


def resolve(
    description: QuantDescription, prefix: str, packed_modules_mapping: Mapping[str, Sequence[str]]
) -> QuantType:
    """The quantization type of vLLM module `prefix`.

    Args:
        description: with tensor names as vLLM spells them (see `QuantDescription.renamed`).
        prefix: the module's name, e.g. `model.layers.0.self_attn.qkv_proj`.
        packed_modules_mapping: vLLM's own, e.g. `{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}`.

    Raises:
        CheckpointError: a shard is missing or unknown, or the shards of a fused module differ in type.
    """
    types = {name: module_type(description, name) for name in shard_names(description, prefix, packed_modules_mapping)}
    if len(set(types.values())) > 1:
        listing = ", ".join(f"{name}: {kind}" for name, kind in types.items())
        raise CheckpointError(
            f"quant_model_description.json: layer {prefix} is computed as one matrix product, so its parts must have "
            f"one quant type, found {listing}. Quantize the model again with one type for all of them."
        )
    return next(iter(types.values()))


def resolve_experts(description: QuantDescription, prefix: str) -> QuantType:
    """The one quantization type of all expert projections below `prefix` (`...mlp.experts`).

    Raises:
        CheckpointError: no expert is described, or the experts differ in type.
    """
    types: dict[QuantType, str] = {}
    for module in expert_projections(description, prefix):
        types.setdefault(module_type(description, module), module)
    if not types:
        raise CheckpointError(_missing(description, prefix))
    if len(types) > 1:
        listing = ", ".join(f"{name}: {kind}" for kind, name in types.items())
        raise CheckpointError(
            f"quant_model_description.json: the experts of {prefix} run as one kernel, so they must have one quant "
            f"type, found {listing}. Quantize the model again with one type for all experts."
        )
    return next(iter(types))


def expert_projections(description: QuantDescription, prefix: str) -> list[str]:
    """Described modules of the experts below `prefix`, as the description spells them; empty if there are none."""
    return next(filter(None, (sorted(_expert_projections(description, s)) for s in spellings(prefix))), [])


def _expert_projections(description: QuantDescription, prefix: str) -> Iterator[str]:
    """Described modules `prefix.<projection>` and `prefix.<number>.<projection>`."""
    for child in description.children.get(prefix, ()):
        is_expert = child.rpartition(".")[2].isdecimal()
        candidates = description.children.get(child, ()) if is_expert else (child,)
        yield from (name for name in candidates if name in description.modules)


def _missing(description: QuantDescription, name: str) -> str:
    modules = list(description.modules)
    near = difflib.get_close_matches(name, modules, n=4, cutoff=0.5)
    hint = f"The nearest names there are {', '.join(near)}." if near else f"It describes {len(modules)} modules."
    return (
        f"quant_model_description.json: layer {name} has no entry '{name}.weight'. {hint} "
        "The description must come from the same model as config.json and the weights."
    )
