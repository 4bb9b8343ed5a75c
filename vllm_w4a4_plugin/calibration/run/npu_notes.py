# SPDX-License-Identifier: Apache-2.0
"""Layers for which NPUs will not use their fastest kernel, as the loader will choose it. Imports no torch."""

from collections.abc import Iterable
from typing import Any

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.runnable import ON_NPU, Kind, unsupported_reason
from vllm_w4a4_plugin.ops.npu.select import Kernel, RankShape, select_kernel

from ..model.structure import Role, group_sizes, head_dim
from ..transforms.sizes import stored_factors


def npu_notes(
    config: Any,
    kinds: Iterable[tuple[Role, QuantType]],
    experts: Iterable[QuantType] = (),
    head: QuantType = QuantType.FLOAT,
) -> list[str]:
    """One sentence for each role whose layers cannot have the fastest of CANN's kernels, on one device.

    Args:
        config: transformers' text config.
        kinds: pairs of role and quant type in the model.
        experts: quant types of its experts.
        head: quant type of its output head.
    """
    notes = [
        f"experts of type {kind} cannot run on NPUs: vllm-ascend has no kernel for them."
        for kind in sorted(set(experts))
        if unsupported_reason("experts", kind, Kind.EXPERTS, backends=ON_NPU)
    ]
    for role, kind in sorted(set(kinds), key=lambda pair: (list(Role).index(pair[0]), pair[1])):
        if unsupported_reason(role, kind, Kind.LINEAR, backends=ON_NPU):
            notes.append(f"{role} layers of type {kind} cannot run on NPUs: vllm-ascend has no kernel for them.")
            continue
        output_size, input_size = group_sizes(config)[role]
        left = right = None
        if kind.spec.has_transform:
            left, right = stored_factors(role, input_size, head_dim(config))
        shape = RankShape(kind, output_size, input_size, 1, left, right)
        choice = select_kernel(shape, has_fused_library=False)
        if choice.kernel is Kernel.NONE:
            notes.append(f"{role} layers of type {kind} cannot run: {choice.reason}.")
        elif choice.reason:
            notes.append(f"{role} layers of type {kind} will run as {choice.kernel}: {choice.reason}.")
    if head.spec.is_quantized:
        choice = select_kernel(RankShape(head, config.vocab_size, config.hidden_size), has_fused_library=False)
        if choice.kernel is Kernel.NONE:
            notes.append(f"an output head of type {head} cannot run: {choice.reason}.")
    return notes
