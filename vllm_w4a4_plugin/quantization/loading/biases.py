# SPDX-License-Identifier: Apache-2.0
"""Biases that the checkpoint has and vLLM's model does not: msModelSlim's m4 adds them to norms and to linear layers.

vLLM drops a `.bias` that the model has no parameter for. Here the module gets one, before weights are loaded, and
computes with it.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.utils import set_weight_attrs

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.resolve import USUALLY_FUSED
from vllm_w4a4_plugin.checkpoint.types import BIAS
from vllm_w4a4_plugin.quantization.head import RotatedHeadMethod
from vllm_w4a4_plugin.quantization.stored_head import StoredHeadMethod

Module = Any
"""A vLLM module. `torch.nn.Module` would type each of its attributes as "Tensor or Module"."""


def add_missing_biases(model: torch.nn.Module, inventory: Inventory, packed_modules: dict[str, list[str]]) -> None:
    """Give every module whose bias is stored a parameter for it.

    Args:
        model: before its weights are loaded.
        inventory: with names as vLLM spells them.
        packed_modules: vLLM's mapping of fused modules to their parts.

    Raises:
        CheckpointError: a bias belongs to a module that cannot have one.
    """
    for name in inventory.tensors:
        module_name, _, suffix = name.rpartition(".")
        if suffix != BIAS or inventory.is_useless(name):
            continue
        module = _find(model, module_name, {**USUALLY_FUSED, **packed_modules})
        if module is not None and getattr(module, BIAS, None) is None:
            _add_bias(module, inventory, name)


def norm_biases(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of the biases that `add_missing_biases` gave to norms."""
    for name, module in model.named_modules():
        if isinstance(module, _BiasedNorm):
            yield f"{name}.{BIAS}", module.bias


class _BiasedNorm:
    """Mixin of a norm: adds `bias` to what it returns, not to the residual that it returns next to it."""

    bias: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if isinstance(output, tuple):
            return (output[0] + self.bias.to(output[0].dtype), *output[1:])
        return output + self.bias.to(output.dtype)


class _BiasedHeadMethod(UnquantizedEmbeddingMethod):
    """vLLM's logits processor passes no bias of the head's own."""

    def apply(self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply(layer, x, layer.bias if bias is None else bias)


def _find(model: torch.nn.Module, name: str, packed_modules: dict[str, Any]) -> Module | None:
    """The module `name`, or the one that it is fused into; None if the model has neither."""
    parent, _, leaf = name.rpartition(".")
    fused = [whole for whole, parts in packed_modules.items() if leaf in parts]
    for candidate in (leaf, *fused):
        try:
            return model.get_submodule(f"{parent}.{candidate}" if parent else candidate)
        except AttributeError:
            continue
    return None


def _add_bias(module: Module, inventory: Inventory, name: str) -> None:
    if isinstance(module, LinearBase):
        size = module.output_size if isinstance(module, RowParallelLinear) else module.output_size_per_partition
        _register(module, size, module.params_dtype, output_dim=0, weight_loader=module.weight_loader)
    elif isinstance(module, ParallelLMHead) and isinstance(
        module.quant_method, (UnquantizedEmbeddingMethod, StoredHeadMethod)
    ):
        size = module.num_embeddings_per_partition
        _register(module, size, module.params_dtype, output_dim=0, weight_loader=module.weight_loader)
        if not isinstance(module.quant_method, (RotatedHeadMethod, StoredHeadMethod)):  # they know of the bias
            module.quant_method = _BiasedHeadMethod()
    elif "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
        _register(module, module.weight.shape[0], module.weight.dtype)
        module.__class__ = _biased_class(type(module))  # type: ignore[arg-type]
    else:
        raise CheckpointError(
            f"{inventory.tensors[name].file}: tensor {inventory.tensors[name].name} is a bias, and vLLM's "
            f"{type(module).__name__} can have none, so the model would compute other numbers. Quantize the model "
            "without it."
        )


def _register(module: Module, size: int, dtype: torch.dtype, **attributes: Any) -> None:
    bias = torch.nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad=False)
    set_weight_attrs(bias, attributes)
    module.register_parameter(BIAS, bias)


@cache
def _biased_class(norm: type) -> type:
    return type(f"{norm.__name__}WithBias", (_BiasedNorm, norm), {})
