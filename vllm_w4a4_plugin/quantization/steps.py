# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and SiLU that wait for the linear layer behind them and are computed in its operator, on CPUs.

In the decoder blocks of BLOCKS the output of a norm goes to one linear layer and nowhere else, and so does that of
SiLU. There they return what is to be computed instead of a tensor, as vLLM's own fused activations do
(`QuantizedActivation`). vLLM's linear layers hand it to their method, which either has an operator for both or computes
the tensor first. Anything else that met such an object would fail, not compute something wrong.

Only without torch.compile, which fuses norms and SiLU itself, and without LoRA, whose layers read the tensor too.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import CompilationMode
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_w4a4_plugin.ops import api, steps

from .direct import call_directly
from .linear import AscendW4A4LinearMethod
from .silu import CpuSiluAndMul

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MODELS = "vllm.model_executor.models."

BLOCKS = {
    "llama.LlamaDecoderLayer": ("llama.LlamaAttention", "llama.LlamaMLP"),
    "qwen2.Qwen2DecoderLayer": ("qwen2.Qwen2Attention", "qwen2.Qwen2MLP"),
    "qwen3.Qwen3DecoderLayer": ("qwen3.Qwen3Attention", "qwen2.Qwen2MLP"),
}
"""Classes in MODELS whose `forward` was read: a decoder block, its attention and its MLP. Others derive from them, some
under the same name, with a `forward` of their own."""

Module = Any
"""A vLLM module. `torch.nn.Module` would type each of its attributes as "Tensor or Module"."""


@dataclass(slots=True, eq=False)
class Normed:
    """RMSNorm of x + residual [..., features], to be computed once; the residual then becomes the sum."""

    operator: ClassVar[str] = "norm_flatquant_linear"
    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    epsilon: float

    def tensor(self) -> torch.Tensor:
        """[..., features] in x's dtype."""
        return steps.rms_norm(self.x, self.residual, self.weight, self.epsilon)

    def linear(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """`api.flatquant_linear` of the tensor, for the arguments that follow x."""
        return steps.norm_flatquant_linear(self.x, self.residual, self.weight, self.epsilon, *arguments, **options)


@dataclass(slots=True, eq=False)
class Activated:
    """silu(gate) * up for x = [gate, up], [..., 2 * features]."""

    operator: ClassVar[str] = "silu_flatquant_linear"
    x: torch.Tensor

    def tensor(self) -> torch.Tensor:
        """[..., features] in x's dtype."""
        return api.silu_and_mul(self.x)

    def linear(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """`api.flatquant_linear` of the tensor, for the arguments that follow x."""
        return steps.silu_flatquant_linear(self.x, *arguments, **options)


class WaitingNorm(RMSNorm):
    """An RMSNorm that leaves its work to the linear layer behind it."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        weight = self._parameters["weight"]
        is_supported = x.is_contiguous() and x.dtype == weight.dtype
        if not is_supported or not (residual is None or (residual.is_contiguous() and residual.dtype == x.dtype)):
            return super().forward(x, residual)
        normed = Normed(x, residual, weight, self.variance_epsilon)
        return normed if residual is None else (normed, residual)


class WaitingSilu(CpuSiluAndMul):
    """A SiLU that leaves its work to the linear layer behind it."""

    def forward(self, x: torch.Tensor) -> Any:
        return Activated(x.contiguous())


def fuse_steps(model: torch.nn.Module, vllm_config: "VllmConfig") -> None:
    """Let the norms and SiLUs of `model` wait wherever their linear layer has an operator for both. Idempotent.

    Args:
        model: with its quantized layers, before their `process_weights_after_loading`.
    """
    if vllm_config.compilation_config.mode != CompilationMode.NONE or vllm_config.lora_config is not None:
        return
    for block in model.modules():
        if _is_known(block):
            _fuse_block(block)
            call_directly(block, vllm_config)


def _is_known(block: Module) -> bool:
    parts = BLOCKS.get(_class_name(block))
    return parts is not None and (_class_name(block.self_attn), _class_name(block.mlp)) == parts


def _class_name(module: Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}".removeprefix(MODELS)


def _fuse_block(block: Module) -> None:
    for norm, linear in (
        (block.input_layernorm, block.self_attn.qkv_proj),
        (block.post_attention_layernorm, block.mlp.gate_up_proj),
    ):
        # A norm with a bias of its own is of another class.
        is_plain = type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None
        if is_plain and _takes(linear, Normed):
            norm.__class__ = WaitingNorm
    if type(block.mlp.act_fn) is CpuSiluAndMul and _takes(block.mlp.down_proj, Activated):
        block.mlp.act_fn.__class__ = WaitingSilu


def _takes(linear: Module, step: type[Normed] | type[Activated]) -> bool:
    """Whether the layer's method has an operator that begins with `step`; it is told that it will."""
    method = linear.quant_method
    return isinstance(method, AscendW4A4LinearMethod) and method.begin_with(step.operator)
