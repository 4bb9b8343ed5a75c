# SPDX-License-Identifier: Apache-2.0
"""Whether a module of a quant type can be run, and if not, why: one answer for loader, `verify` and `doctor`."""

import re
from enum import StrEnum
from typing import TYPE_CHECKING

from vllm_w4a4_plugin.constants import DESCRIPTION_FILE, INT4_GROUP_MULTIPLE

from .errors import in_file
from .model_config import HEAD
from .types import CPU, NPU, VLLM_ASCEND, QuantType, known_types

if TYPE_CHECKING:
    from .spec import LinearSpec

ON_CPU = frozenset({CPU})
ON_NPU = frozenset({NPU, VLLM_ASCEND})
"""What runs a model: our kernels on CPUs, or ours on NPUs together with vllm-ascend's."""


class Kind(StrEnum):
    """What a module is to vLLM; the value names several of them in messages."""

    LINEAR = "linear layers"
    EXPERTS = "experts"
    EMBEDDING = "embeddings"
    HEAD = "output heads"
    ROUTER = "routers of experts"
    LATENT = "up-projections of latent attention (MLA)"
    VISION = "vision parts"


_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
_VISION = re.compile(r"(^|\.)(visual|vision_(tower|model|encoder))\.")


def kind_of(module: str) -> Kind:
    """The kind of a module that has a weight matrix, by its name."""
    leaf = module.rpartition(".")[2]
    if _EXPERTS.search(module):
        return Kind.EXPERTS
    if leaf == HEAD:
        return Kind.HEAD
    if leaf in ("gate", "router"):
        return Kind.ROUTER
    if leaf == "kv_b_proj":
        return Kind.LATENT
    if "embed" in leaf or leaf in ("wte", "wpe"):
        return Kind.EMBEDDING
    return Kind.VISION if _VISION.search(module) else Kind.LINEAR


def types_for(kind: Kind, backends: frozenset[str] = ON_CPU) -> tuple[QuantType, ...]:
    """The types that modules of a kind can have to be run."""
    if kind is Kind.EXPERTS:
        return tuple(t for t in known_types() if t.spec.experts_run_on & backends)
    # Of what is neither a linear layer nor an expert the plugin has output heads of few types, and nothing else.
    where = backends if kind in (Kind.LINEAR, Kind.VISION) else backends & {VLLM_ASCEND}
    has_heads = kind is Kind.HEAD and CPU in backends
    types = tuple(
        t
        for t in known_types()
        if t is QuantType.FLOAT or t.spec.runs_on & where or (has_heads and t.spec.head_runs_on_cpu)
    )
    # No tool that we know makes vision parts with 4-bit activations: such a description is that of other weights.
    return tuple(t for t in types if t.spec.activation_bits > 4) if kind is Kind.VISION else types


def unsupported_reason(
    module: str,
    quant_type: QuantType,
    kind: Kind,
    spec: "LinearSpec | None" = None,
    backends: frozenset[str] = ON_CPU,
    file: str = DESCRIPTION_FILE,
) -> str:
    """Message for a module that cannot be run as it is quantized, "" if it can.

    Args:
        module: name of the layer, for the message.
        quant_type: its type.
        kind: what it is.
        spec: its dimensions, where they are known.
        backends: that may run it.
        file: that gives it this type; "" if none does.
    """
    types = types_for(kind, backends)
    if quant_type in types:
        return _unsupported_groups(module, spec) if spec is not None and backends == ON_CPU else ""
    what = "" if kind is Kind.LINEAR else f"{kind} of "
    where = "here" if backends == ON_CPU else "on NPUs"
    elsewhere = quant_type in types_for(kind, frozenset({VLLM_ASCEND})) and VLLM_ASCEND not in backends
    return (
        f"{in_file(file)}layer {module}: {what}quant type {quant_type} cannot be run {where}. "
        f"Types that can: {', '.join(types)}. "
        f"{'vllm-ascend runs it on NPUs. ' if elsewhere else ''}"
        "Quantize the model again with one of them for this layer."
    )


def _unsupported_groups(module: str, spec: "LinearSpec") -> str:
    group_size = spec.input_size // spec.groups
    if spec.groups == 1 or group_size % INT4_GROUP_MULTIPLE == 0:
        return ""
    return (
        f"layer {module}: group size {group_size} is not a multiple of {INT4_GROUP_MULTIPLE}, which the CPU kernels "
        "need. Quantize again with another group size or per channel."
    )
