# SPDX-License-Identifier: Apache-2.0
"""One linear layer in every way that a user of this CPU can run it: our kernel, vLLM's own and llama.cpp's."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_w4a4_plugin import ops
from vllm_w4a4_plugin.checkpoint.spec import kronecker_sizes

from .ggml import GgmlLinear, GgmlUnavailable
from .shapes import Linear

Run = Callable[[Tensor], Tensor]


class Unavailable(RuntimeError):
    """The kernel does not exist in this vLLM on this CPU."""


@dataclass(frozen=True)
class Prepared:
    """A linear layer with random weights, ready to run on x [tokens, input_size] of type `dtype`."""

    run: Run
    weight_bytes: int
    kernel: str
    weight: Tensor | None = None
    """The packed weight that our kernel reads."""
    dtype: torch.dtype = torch.bfloat16
    transform: tuple[Tensor | None, Tensor | None, Tensor] | None = None
    """Our kernel's two factors and clip ratio."""


def w4a4_flatquant(linear: Linear) -> Prepared:
    """`flatquant_linear`: transform, per-token quantization and int4 product in one call."""
    left, right = kronecker_sizes(linear.input_size)
    left_trans, right_trans = (torch.randn(n, n) / n**0.5 for n in (left, right))
    return _w4a4(linear, left_trans, right_trans)


def w4a4_dynamic(linear: Linear) -> Prepared:
    """The same without a transform."""
    return _w4a4(linear, None, None)


def _w4a4(linear: Linear, left_trans: Tensor | None, right_trans: Tensor | None) -> Prepared:
    packed = torch.randint(0, 256, ops.packed_int4_shape(linear.output_size, linear.input_size), dtype=torch.uint8)
    scale, clip = torch.rand(linear.output_size), torch.tensor([0.95])

    def run(x: Tensor) -> Tensor:
        return torch.ops.vllm_w4a4.flatquant_linear(x, packed, scale, left_trans, right_trans, clip)

    kernel = f"flatquant_linear, {ops.cpu_instruction_set()}"
    return Prepared(run, packed.numel(), kernel, packed, transform=(left_trans, right_trans, clip))


def bf16(linear: Linear) -> Prepared:
    """What vLLM runs for an unquantized model: `onednn_mm`, or torch's linear where oneDNN has no bf16 kernel."""
    from vllm import _custom_ops as vllm_ops

    weight = torch.randn(linear.output_size, linear.input_size, dtype=torch.bfloat16)
    try:
        handler = vllm_ops.create_onednn_mm(weight.t(), 32)
    except RuntimeError:  # vLLM's own fallback: oneDNN has no bf16 kernel below AVX-512
        return Prepared(lambda x: torch.nn.functional.linear(x, weight), weight.numel() * 2, "torch linear")
    return Prepared(lambda x: vllm_ops.onednn_mm(handler, x, None), weight.numel() * 2, "onednn_mm")


def w8a8(linear: Linear) -> Prepared:
    """vLLM's `onednn_scaled_mm` with its per-token quantization."""
    from vllm import _custom_ops as vllm_ops

    weight = torch.randint(-127, 128, (linear.output_size, linear.input_size), dtype=torch.int8)
    scale = torch.rand(linear.output_size)
    handler = vllm_ops.create_onednn_scaled_mm(weight.t(), scale, torch.bfloat16, True, False, 32)

    def run(x: Tensor) -> Tensor:
        q, q_scale, _ = vllm_ops.onednn_scaled_int8_quant(x)
        y = torch.empty(x.shape[0], linear.output_size, dtype=x.dtype)
        return vllm_ops.onednn_scaled_mm(handler, q, y, q_scale, None, None, None)

    return Prepared(run, weight.numel(), "dynamic_scaled_int8_quant + onednn_scaled_mm")


def w4a16(linear: Linear) -> Prepared:
    """vLLM's `cpu_gemm_wna16` (GPTQ, AWQ), group size 128 where it divides the input size."""
    from vllm import _custom_ops as vllm_ops

    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        raise Unavailable("vLLM has no cpu_gemm_wna16 for this CPU")
    blocks = linear.output_size // 16
    packed = torch.randint(-(2**31), 2**31 - 1, (blocks, linear.input_size * 2), dtype=torch.int32)
    group = 128 if linear.input_size % 128 == 0 else linear.input_size
    scales = torch.rand(linear.input_size // group, linear.output_size).bfloat16()
    hint = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

    def run(x: Tensor) -> Tensor:
        return vllm_ops.cpu_gemm_wna16(x, packed, scales, None, None, 8, hint)

    return Prepared(run, packed.numel() * 4, f"cpu_gemm_wna16, {hint}")


def float32(linear: Linear) -> Prepared:
    """What vLLM runs with `--dtype float32`, the faster choice for an unquantized model on CPUs without AVX-512."""
    from vllm import _custom_ops as vllm_ops

    weight = torch.randn(linear.output_size, linear.input_size)
    handler = vllm_ops.create_onednn_mm(weight.t(), 32)
    return Prepared(
        lambda x: vllm_ops.onednn_mm(handler, x, None), weight.numel() * 4, "onednn_mm, float32", dtype=torch.float32
    )


def q4_0(linear: Linear) -> Prepared:
    """llama.cpp's Q4_0: 4-bit weights in blocks of 32, activations rounded to 8 bits in blocks of 32."""
    try:
        product = GgmlLinear(linear)
    except GgmlUnavailable as reason:
        raise Unavailable(str(reason)) from None
    return Prepared(
        product.run, linear.input_size * linear.output_size * 18 // 32, f"ggml_mul_mat, {product.layout}",
        dtype=torch.float32,
    )  # fmt: skip


PEERS: dict[str, Callable[[Linear], Prepared]] = {
    "w4a4_flatquant": w4a4_flatquant,
    "w4a4_dynamic": w4a4_dynamic,
    "w8a8": w8a8,
    "w4a16": w4a16,
    "q4_0": q4_0,
    "bf16": bf16,
    "float32": float32,
}
