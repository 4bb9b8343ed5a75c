# SPDX-License-Identifier: Apache-2.0
"""W8A8_DYNAMIC: int8 weights per channel, int8 activations per token.

vLLM's own CPU kernels compute it, where they compute it right. oneDNN's int8 product, which they use, saturates 16-bit
sums on x86 CPUs without VNNI: with weights over the whole int8 range the output is wrong by over 10 %. So the kernel
that vLLM chooses is tried once on a small product, and if it fails our exact one is used.
Drop that when oneDNN's int8 matmul is exact on AVX2.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import init_int8_linear_kernel

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.types import WEIGHT
from vllm_w4a4_plugin.constants import LOGGER
from vllm_w4a4_plugin.ops import api, cpu, reference
from vllm_w4a4_plugin.ops.self_check import require_working_kernels
from vllm_w4a4_plugin.quantization.parameters.base import MatrixParameter
from vllm_w4a4_plugin.quantization.parameters.cpu import Int8Parameter

from .base import Layer, LayerShape, LinearScheme
from .registry import register_scheme
from .whole_tokens import LOCAL_SCALES_REMARK, MAXIMUM_BYTES, gather_quantized

logger = init_logger(LOGGER)

KERNEL_LOGGER = "vllm.model_executor.kernels.linear"

TOLERATED_ERROR = 0.02
"""Relative error of a product in bfloat16 that is put down to rounding; saturation gives over 0.1."""


@register_scheme(QuantType.W8A8_DYNAMIC)
class W8A8DynamicScheme(LinearScheme):
    """vLLM's kernel repacks the weight and drops the original; vLLM's reload restores it before loading again.

    In a row-parallel layer, ranks with our own kernel quantize their parts of a token for all ranks. vLLM's kernels
    quantize by themselves, and get whole tokens.
    """

    def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
        self.shape = shape
        self.fault = fault_of_vllm_kernel(shape.params_dtype)
        if self.fault:
            require_working_kernels(shape.params_dtype, weight_bits=8)
            self._register_weight(layer, shape, weight_loader, Int8Parameter)
        else:
            self.kernel = _new_vllm_kernel(layer, [shape.output_size_per_partition], type(self).__name__)
            weight = MatrixParameter(
                torch.zeros(shape.sizes, dtype=torch.int8),
                sizes=shape.sizes,
                input_parts=shape.input_parts,
                plan=self.plan,
                suffix=WEIGHT,
                weight_loader=weight_loader,
            )
            layer.register_parameter(WEIGHT, weight)
        self._register_scales(layer, shape, weight_loader)

    def process_weights_after_loading(self, layer: Layer) -> None:
        if not self.fault:
            _pack(self.kernel, layer, self.shape.params_dtype)
            if layer.weight is None:  # vLLM's LoRA layers ask the weight for its device
                layer.weight = torch.nn.Parameter(torch.empty(0, dtype=torch.int8), requires_grad=False)

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.fault:
            return api.w8a8_linear(x, layer.weight, layer.weight_scale, bias)
        y = self.kernel.apply_weights(layer, x, bias)
        # vLLM's kernel drops a NaN, whose token then looks like any other.
        return y + x.abs().amax(-1, keepdim=True) * 0

    def multiply_gathered(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not self.fault:
            return super().multiply_gathered(layer, x, bias)
        return api.int8_linear(*gather_quantized(x, 8), layer.weight, layer.weight_scale, bias, None, x.dtype)

    def gathered_bytes(self, features: int, dtype: torch.dtype) -> int:
        return features + MAXIMUM_BYTES if self.fault else super().gathered_bytes(features, dtype)

    @property
    def packs_weights(self) -> bool:
        return bool(self.fault)

    @property
    def operator(self) -> str:
        if self.fault:
            return f"vllm_w4a4::w8a8_linear, {cpu.cpu_instruction_set()}"
        return f"vLLM {type(self.kernel).__name__}"

    @property
    def remark(self) -> str:
        local = LOCAL_SCALES_REMARK if self.shape.is_row_parallel else ""
        return "; ".join(filter(None, (local, f"not vLLM's kernel: {self.fault}" if self.fault else "")))

    def weight_bytes(self, layer: Layer) -> int:
        return self.shape.output_size_per_partition * self.shape.input_size_per_partition


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Nothing is logged to the logger with this name."""
    filtered = logging.getLogger(name)
    filtered.addFilter(_nothing)
    try:
        yield
    finally:
        filtered.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


@cache
def fault_of_vllm_kernel(dtype: torch.dtype) -> str:
    """What is wrong with vLLM's int8 kernel for activations of `dtype` on this machine, "" if nothing is.

    Multiplies random int8 matrices over the whole value range, a few and many tokens, and compares with the reference.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (256, 512), dtype=torch.int8, generator=generator)
    scale = torch.full((256, 1), 1e-3, dtype=torch.float32)
    try:
        layer: Layer = torch.nn.Module()
        layer.register_parameter("weight", torch.nn.Parameter(weight.clone(), requires_grad=False))
        layer.register_parameter("weight_scale", torch.nn.Parameter(scale.clone(), requires_grad=False))
        layer.register_parameter("bias", None)
        with _silent(KERNEL_LOGGER):  # vLLM logs its choice, which may not be ours
            kernel = _new_vllm_kernel(layer, [256], "a trial")
        _pack(kernel, layer, dtype)
        errors = []
        for tokens in (1, 17):
            x = torch.randn(tokens, 512, generator=generator).to(dtype)
            expected = reference.w8a8_linear(x, weight, scale.view(-1)).float()
            found = kernel.apply_weights(layer, x, None).float()
            errors.append(((found - expected).norm() / expected.norm()).item())
    except (AttributeError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        logger.debug("vLLM's int8 kernel failed", exc_info=True)
        return f"it does not run here ({str(error).splitlines()[0][:80]})"
    return f"inexact on this CPU (error {max(errors):.0%})" if max(errors) > TOLERATED_ERROR else ""


def _new_vllm_kernel(layer: Layer, widths: list[int], user: str) -> Any:
    """vLLM's int8 kernel for this platform, and on `layer` the attributes that it reads; the log names `user`, once."""
    layer.logical_widths = widths
    for absent in ("input_scale", "input_zero_point", "azp_adj"):
        layer.register_parameter(absent, None)
    return init_int8_linear_kernel(
        is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name=user
    )


def _pack(kernel: Any, layer: Layer, dtype: torch.dtype) -> None:
    """Have vLLM's kernel pack the weight for activations of `dtype`, again after each load.

    vLLM's kernel for AMX does not take float32, although vLLM chooses it for that: oneDNN's does.

    oneDNN's handler refers to the weight scales where they are now, and vLLM's reload moves them: they are kept here.
    Compiled graphs hold the tensor with the handler's address, so a new handler's address goes into the first tensor.
    The kernel takes torch's default dtype for that of activations, which is the model's only while vLLM first loads it.
    Drop this when vLLM's CPUInt8ScaledMMLinearKernel can be reloaded.
    """
    default, first = torch.get_default_dtype(), getattr(kernel, "dnnl_handler", None)
    torch.set_default_dtype(dtype)
    try:
        if dtype == torch.float32:
            kernel.linear_method = kernel._apply_weights_onednn
            kernel.process_weights_for_onednn(layer)
        else:
            kernel.process_weights_after_loading(layer)
    finally:
        torch.set_default_dtype(default)
    kernel.packed_scale = layer.weight_scale.data
    new: Any = getattr(kernel, "dnnl_handler", None)
    if first is not None and new is not first:
        address = first.handler_tensor.clone()
        first.handler_tensor.copy_(new.handler_tensor)
        new.handler_tensor.copy_(address)  # released with it
        first.k, first.n, kernel.dnnl_handler = new.k, new.n, first
