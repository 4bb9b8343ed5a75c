# SPDX-License-Identifier: Apache-2.0
"""Decoder blocks that call their layers directly, on CPUs.

Between two operators of a block vLLM goes through a module, a linear method, a scheme and dispatchers, all in Python.
For one token of a small model that takes longer than the operators. Here the same steps are taken in the same order,
and what does not change from call to call is looked up once. The numbers are the same.
"""

import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from vllm_w4a4_plugin.constants import PROVIDER

from .linear import AscendW4A4LinearMethod
from .norms import rms_norm

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Module = Any
"""A vLLM module. `torch.nn.Module` would type each of its attributes as "Tensor or Module"."""

Function = Callable[..., Any]

READ = {
    "LlamaDecoderLayer.forward": {"b34c1552bf7c3aa5a7bcf8eccd1a3061"},
    "LlamaAttention.forward": {"7c63fbafef7f514d29132f8940004aa3"},
    "LlamaMLP.forward": {"eb6f15165e93b11b4820e8e1d2711efc", "559fd8f067bbbdfd146858d546da5ae2"},
    "Qwen2DecoderLayer.forward": {"136f4a982b8501be62a61f141b68c9b7"},
    "Qwen2Attention.forward": {"545d12b2e766294adb1397b54fb73a0b"},
    "Qwen2MLP.forward": {"55f6ee1c64e1a12dd24c39da484d6b10"},
    "Qwen3DecoderLayer.forward": {"136f4a982b8501be62a61f141b68c9b7"},
    "Qwen3Attention.forward": {"4326685e7f4c49f6143eb420bf34a08a"},
    "RotaryEmbedding.forward_cpu": {"b52352a0917f40a631ef67bb19783f3d"},
}
"""Fingerprints of vLLM's functions that were read, in all versions. One with another fingerprint is called as it is."""

NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def fingerprint(function: Function) -> str:
    """Half of the SHA-256 of a function's source, in hexadecimal digits, without comments and layout."""
    source = io.StringIO(textwrap.dedent(inspect.getsource(function)))
    tokens = (token.string for token in tokenize.generate_tokens(source.readline) if token.type not in NOT_CODE)
    return hashlib.sha256(" ".join(tokens).encode()).hexdigest()[:32]


@cache
def was_read(function: Function) -> bool:
    """Whether a function of vLLM's has the source whose steps are taken here."""
    try:
        return fingerprint(function) in READ.get(function.__qualname__, ())
    except OSError:  # vLLM is installed without its sources
        return False


def call_directly(block: Module, vllm_config: "VllmConfig") -> None:
    """Let a decoder block of `steps.BLOCKS` call its layers directly, if its code was read. Idempotent."""
    if all(was_read(type(part).forward) for part in (block, block.self_attn, block.mlp)):
        block.forward = DirectBlock(block, vllm_config)


class DirectBlock:
    """The `forward` of a decoder block. A block with a hook on one of its modules runs through them, as in vLLM.

    Args:
        block: with its quantized layers created. Their parameters are read at each call.
    """

    def __init__(self, block: Module, vllm_config: "VllmConfig") -> None:
        attention, mlp = block.self_attn, block.mlp
        self.through_modules = type(block).forward.__get__(block)
        self.hooks = [hooks for part in block.modules() for hooks in (part._forward_pre_hooks, part._forward_hooks)]
        self.input_norm, self.norm = block.input_layernorm.forward, block.post_attention_layernorm.forward
        self.qkv, self.o = _linear(attention.qkv_proj), _linear(attention.o_proj)
        self.gate_up, self.down = _linear(mlp.gate_up_proj), _linear(mlp.down_proj)
        self.sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        self.has_head_norms = hasattr(attention, "q_norm")
        if self.has_head_norms:
            self.q_norm = _head_norm(attention.q_norm, attention.num_heads, vllm_config)
            self.k_norm = _head_norm(attention.k_norm, attention.num_kv_heads, vllm_config)
        self.rotate, self.attend = _rotation(attention.rotary_emb), attention.attn.forward
        self.activate = mlp.act_fn.forward

    def __call__(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As vLLM's `forward`: (output, residual), both [tokens, hidden_size]."""
        if any(self.hooks):
            through_modules: tuple[torch.Tensor, torch.Tensor] = self.through_modules(
                positions, hidden_states, residual
            )
            return through_modules
        # vLLM's parameters override every operator that they are passed to, without changing what it does.
        with torch._C.DisableTorchFunctionSubclass():
            if residual is None:
                residual, normed = hidden_states, self.input_norm(hidden_states)
            else:
                normed, residual = self.input_norm(hidden_states, residual)
            q, k, v = self.qkv(normed).split_with_sizes(self.sizes, -1)
            if self.has_head_norms:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = self.rotate(positions, q, k)
            normed, residual = self.norm(self.o(self.attend(q, k, v)), residual)
            return self.down(self.activate(self.gate_up(normed))), residual


def _linear(layer: Module) -> Function:
    """A function from the layer's input, a tensor or what `steps` has in its place, to its output."""
    method = layer.quant_method
    if not isinstance(method, AscendW4A4LinearMethod) or method.part or layer.tp_size > 1 or layer.skip_bias_add:
        return lambda x: layer(x)[0]
    apply = method.scheme.apply
    return lambda x: apply(layer, x, layer._parameters.get("bias"))


def _head_norm(norm: Module, heads: int, vllm_config: "VllmConfig") -> Function:
    """A function from [tokens, heads * head_size] to the same, each head normed."""
    size, epsilon, forward = norm.hidden_size, norm.variance_epsilon, norm.forward
    is_plain = type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None
    if not is_plain or vllm_config.kernel_config.ir_op_priority.rms_norm[:1] != [PROVIDER]:
        return lambda x: forward(x.view(-1, heads, size)).view(-1, heads * size)
    stored = norm._parameters

    def of_heads(x: torch.Tensor) -> torch.Tensor:
        weight, x = stored["weight"], x.view(-1, heads, size)
        normed: torch.Tensor = rms_norm(x, weight, epsilon) if weight.dtype == x.dtype else forward(x)
        return normed.view(-1, heads * size)

    return of_heads


def _rotation(rotary: Module) -> Function:
    """A function from (positions, query, key) to (query, key), rotated in place."""
    forward: Function = rotary.forward
    chosen = getattr(getattr(rotary, "_forward_method", None), "__func__", None)
    has_kernel = hasattr(torch.ops._C, "rotary_embedding")
    if not has_kernel or chosen is not RotaryEmbedding.forward_cpu or not was_read(chosen):
        return forward
    rotary_embedding, size, is_neox = torch.ops._C.rotary_embedding.default, rotary.head_size, rotary.is_neox_style

    def rotate(positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rotary_embedding(positions, query, key, size, rotary._match_cos_sin_cache_dtype(query), is_neox)
        return query, key

    return rotate
