# SPDX-License-Identifier: Apache-2.0
"""A transformers model without weights, whose decoder blocks are replaced by stubs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_w4a4_plugin.checkpoint import CheckpointError

from ..errors import CalibrationError
from .unsupported import SUPPORTED, has_vision, refuse_unsupported

BlockArguments = dict[str, Any]


def build_skeleton(directory: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """transformers' config of a model, and the model with its parameters on the meta device.

    Raises:
        CalibrationError: transformers cannot build it, or it is quantized already.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if "quantize" in config.to_dict() or getattr(config, "quantization_config", None):
            raise CalibrationError(f"{directory}: config.json says that this model is quantized already.")
        refuse_unsupported(config, directory)
        with _parameters_on_meta():
            skeleton = (
                model_class(config)
                .from_config(
                    config,
                    trust_remote_code=trust_remote_code,
                    attn_implementation=attention_implementation(config),
                    dtype=torch.float32,
                )
                .eval()
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CalibrationError(f"{directory}: transformers cannot build this model: {error}") from None
    return config, skeleton.requires_grad_(False)


def model_class(config: Any) -> Any:
    """transformers' class that makes the model of a config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM


def attention_implementation(config: Any) -> str:
    """transformers' implementation of attention for a config; "sdpa" leaves out the soft cap that Gemma 2 has."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"


class BlockStub(nn.Module):
    """Replaces a decoder block: records its arguments and returns its input, or `replacement` if that is set."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not as a submodule: the stub has no parameters
        self.arguments: BlockArguments = {}
        self.hidden = torch.empty(0)
        self.replacement: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)  # e.g. attention_type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.replacement is not None:
            return self.replacement
        _, *names = signature(object.__getattribute__(self, "_block").forward).parameters
        self.hidden, self.arguments = hidden_states, {**dict(zip(names, args, strict=False)), **kwargs}
        return hidden_states


def replace_blocks(skeleton: Any, count: int | None, directory: Path) -> tuple[str, list[nn.Module]]:
    """Replace the decoder blocks by stubs; returns the name of their list and the blocks.

    Args:
        skeleton: changed in place.
        count: how many blocks the config promises.
        directory: of the model, for messages.

    Raises:
        CalibrationError: there is not exactly one list of `count` modules.
    """
    decoder = set(skeleton.get_decoder().modules())  # a vision tower has blocks, too
    found = [
        (name, module)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and module in decoder
    ]
    if len(found) != 1:
        raise CalibrationError(
            f"{directory}: expected one list of {count} decoder blocks in {type(skeleton).__name__}, "
            f"found {len(found)}. {SUPPORTED}"
        )
    name, blocks = found[0]
    parent, _, leaf = name.rpartition(".")
    setattr(skeleton.get_submodule(parent), leaf, nn.ModuleList([BlockStub(block) for block in blocks]))
    return name, list(blocks)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without storage; their buffers (rotary frequencies) are real."""
    original: Callable[..., None] = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
