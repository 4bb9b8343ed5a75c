# SPDX-License-Identifier: Apache-2.0
"""The experts of one layer in every way that a user of this CPU can run them: ours, vLLM's own and llama.cpp's."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from vllm_w4a4_plugin import ops
from vllm_w4a4_plugin.checkpoint.spec import kronecker_sizes
from vllm_w4a4_plugin.ops import packing

from .ggml import GgmlExperts, GgmlUnavailable
from .peers import Unavailable
from .shapes import Experts

Run = Callable[[Tensor, Tensor, Tensor], Tensor]

INT4_GROUP = 128
"""Input features that share a scale in vLLM's int4 experts."""


@dataclass(frozen=True)
class PreparedExperts:
    """Experts with random weights, ready to run on x [tokens, hidden] of type `dtype` with a `Experts.routing`."""

    run: Run
    kernel: str
    dtype: torch.dtype = torch.bfloat16
    weight_bytes: int = 0
    """Of our packed weights."""


def w4a4_flatquant(experts: Experts) -> PreparedExperts:
    """`experts_mlp` as msModelSlim's checkpoints have it: one transform for gate and up, one per expert for down."""
    count, clip = experts.count, torch.tensor([0.95])
    left, right = (_factors(1, size)[0] for size in kronecker_sizes(experts.hidden))
    down_left, down_right = (_factors(count, size) for size in kronecker_sizes(experts.intermediate))
    return _w4a4(
        experts, w13_left_trans=left, w13_right_trans=right, w13_clip_ratio=clip, w2_left_trans=down_left,
        w2_right_trans=down_right, w2_clip_ratio=clip.repeat(count),
    )  # fmt: skip


def w4a4_dynamic(experts: Experts) -> PreparedExperts:
    """The same without transforms."""
    whole = torch.ones(1)
    return _w4a4(experts, w13_clip_ratio=whole, w2_clip_ratio=whole)


def _factors(count: int, size: int) -> Tensor:
    return torch.randn(count, size, size) / size**0.5


def _w4a4(experts: Experts, **transforms: Tensor) -> PreparedExperts:
    def matrices(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        packed = packing.zeros(ops.packed_int4_shape(outputs, inputs), torch.uint8, count=experts.count)
        scale = torch.rand(experts.count, outputs) * 0.2 / sqrt(inputs)
        return packed.random_(), scale

    w13, w2 = matrices(2 * experts.intermediate, experts.hidden), matrices(experts.hidden, experts.intermediate)

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return ops.experts_mlp(x, weights, ids, *w13, *w2, **transforms)

    kernel = f"experts_mlp, {ops.cpu_instruction_set()}"
    return PreparedExperts(run, kernel, weight_bytes=w13[0].numel() + w2[0].numel())


def bf16(experts: Experts) -> PreparedExperts:
    """What vLLM runs for unquantized experts."""
    return _unquantized(experts, torch.bfloat16)


def float32(experts: Experts) -> PreparedExperts:
    """The same with `--dtype float32`."""
    return _unquantized(experts, torch.float32)


def _unquantized(experts: Experts, dtype: torch.dtype) -> PreparedExperts:
    from vllm import _custom_ops as vllm_ops
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend, backend_to_kernel_cls

    # The classes in vLLM's order; those of one architecture take bfloat16 only.
    isa = next(
        each.isa
        for each in backend_to_kernel_cls(UnquantizedMoeBackend.CPU)
        if issubclass(each, cpu_moe.CPUUnquantizedExperts)
        and each._supports_current_device()
        and (dtype == torch.bfloat16 or each is cpu_moe.CPUUnquantizedExperts)
    )

    def matrices(outputs: int, inputs: int) -> Tensor:
        values = torch.empty(experts.count, outputs, inputs, dtype=dtype).normal_(std=1 / sqrt(inputs))
        return vllm_ops.cpu_prepack_moe_weight(values, isa)

    w13, w2 = matrices(2 * experts.intermediate, experts.hidden), matrices(experts.hidden, experts.intermediate)

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y = torch.empty_like(x)
        vllm_ops.cpu_fused_moe(y, x, w13, w2, None, None, weights, ids, "silu", isa)
        return y

    return PreparedExperts(run, f"cpu_fused_moe, {isa}, {str(dtype).removeprefix('torch.')}", dtype)


def w4a16(experts: Experts) -> PreparedExperts:
    """vLLM's int4 experts (GPTQ, compressed-tensors), which exist for AMX."""
    from vllm import _custom_ops as vllm_ops
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    if not cpu_moe.CPUExpertsInt4._supports_current_device():
        raise Unavailable("vLLM's int4 experts on CPUs need AMX (x86) or are W4A8 (Arm)")

    def matrices(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        packed = torch.randint(-(2**31), 2**31 - 1, (experts.count, inputs // 8, outputs), dtype=torch.int32)
        return packed, torch.rand(experts.count, inputs // INT4_GROUP, outputs).bfloat16() / sqrt(inputs)

    w13, s13 = matrices(2 * experts.intermediate, experts.hidden)
    w2, s2 = matrices(experts.hidden, experts.intermediate)
    w13, w2, s13, s2, z13, z2 = cpu_moe.prepare_int4_moe_layer_for_cpu(w13, w2, s13, s2)

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y = torch.empty_like(x)
        method = vllm_ops.CPUQuantMethod.INT4_W4A8
        vllm_ops.fused_experts_cpu(y, x, w13, w2, weights, ids, method, s13, s2, z13, z2, None)
        return y

    return PreparedExperts(run, "fused_experts_cpu, int4")


def q4_0(experts: Experts) -> PreparedExperts:
    """llama.cpp's graph for a mixture of experts, three `ggml_mul_mat_id`, in Q4_0."""
    try:
        product = GgmlExperts(experts)
    except GgmlUnavailable as reason:
        raise Unavailable(str(reason)) from None
    return PreparedExperts(product.run, f"ggml_mul_mat_id, {product.layout}", torch.float32)


PEERS: dict[str, Callable[[Experts], PreparedExperts]] = {
    "w4a4_flatquant": w4a4_flatquant,
    "w4a4_dynamic": w4a4_dynamic,
    "w4a16": w4a16,
    "q4_0": q4_0,
    "bf16": bf16,
    "float32": float32,
}
OURS = ("w4a4_flatquant", "w4a4_dynamic")
