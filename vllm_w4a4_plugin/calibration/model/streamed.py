# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face causal language model whose decoder blocks are loaded one at a time."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_w4a4_plugin.checkpoint.accounting import MTP, useless_reason

from ..errors import CalibrationError
from .experts import find_experts, read_parameter, separate, stored_linear, stored_parameter
from .folds import Width
from .skeleton import BlockArguments, BlockStub, build_skeleton, replace_blocks
from .structure import Experts, Group, head_dim, kv_heads
from .tracing import randomize, trace
from .unsupported import SUPPORTED, family, no_layers
from .weights import FloatWeights

HEAD = "lm_head.weight"

_TRACE_TOKENS = 8


class StreamedModel:
    """Embedding, final norm and head in memory; decoder blocks read from the safetensors shards on request.

    Arithmetic is float32: the fastest on CPU, and it adds no rounding of its own to what is measured.

    Args:
        directory: of the float model.
        device: where blocks run.
        trust_remote_code: run the model's own Python code.

    Attributes:
        weights: the stored tensors.
        config, skeleton: transformers' config, and the model with stubs instead of blocks.
        tied: whether the head is the embedding.
        groups: of every block, by their keys.
        experts: of every block, those that can be quantized.

    Raises:
        CalibrationError: not a causal language model of supported structure, or tensors are missing.
    """

    def __init__(self, directory: Path, device: str = "cpu", trust_remote_code: bool = False) -> None:
        self.directory, self.device = directory, torch.device(device)
        self.weights = FloatWeights(directory)
        self.config, self.skeleton = build_skeleton(directory, trust_remote_code)
        text_config = self.config.get_text_config()
        count = getattr(text_config, "num_hidden_layers", None)
        self.blocks_name, self._blocks = replace_blocks(self.skeleton, count, directory)
        first, _ = next(self._blocks[0].named_parameters())
        stored = self.weights.stored_name(f"{self.blocks_name}.0.{first}")
        self.stored_blocks_name = stored.removesuffix(f".0.{first}")
        self.tied = bool(getattr(text_config, "tie_word_embeddings", self.config.tie_word_embeddings))
        self._load_outer()
        traced = self._trace_blocks()
        self.groups, self.experts = [groups for groups, _ in traced], [experts for _, experts in traced]

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.config.get_text_config().hidden_size

    @property
    def embedding_name(self) -> str:
        """Name of the token embedding in the files."""
        embedding = self.skeleton.get_input_embeddings()
        name = next(name for name, module in self.skeleton.named_modules() if module is embedding)
        return self.weights.stored_name(f"{name}.weight").removesuffix(".weight")

    def block_name(self, index: int) -> str:
        """Full name of block `index` in the files, e.g. `model.layers.3`."""
        return f"{self.stored_blocks_name}.{index}"

    def stored_linear(self, index: int, name: str) -> str:
        """Full name in the files of the linear layer `name` of block `index`."""
        return stored_linear(self.weights, f"{self.block_name(index)}.{name}")

    def expert_names(self, index: int, experts: Experts) -> list[str]:
        """Full names in the files of the linear layers of some experts of block `index`, expert by expert."""
        return [self.stored_linear(index, name) for name in experts.all_linears]

    def stored_experts(self, index: int, experts: Experts) -> str:
        """Full name in the files of the module of some experts of block `index`."""
        return self.stored_linear(index, experts.all_linears[0]).rpartition(".")[0].rpartition(".")[0]

    def linear_names(self) -> list[str]:
        """Full names of the linear layers of all blocks that can be quantized, without those of experts."""
        return [
            f"{self.block_name(index)}.{name}"
            for index, groups in enumerate(self.groups)
            for group in groups.values()
            for name in group.linears
        ]

    def float_names(self) -> list[str]:
        """Full names of the other modules of all blocks that have matrices: they stay FLOAT."""
        return [name for index in range(len(self)) for name in self.float_weights(index)]

    def float_weights(self, index: int) -> dict[str, list[str]]:
        """Full names of the modules of block `index` that stay FLOAT -> names in the files of their matrices."""
        linears = {name for group in self.groups[index].values() for name in group.linears}
        quantizable = {*linears, *(experts.name for experts in self.experts[index])}
        modules: dict[str, list[str]] = {}
        for name, parameter in self._blocks[index].named_parameters():
            module, prefix = name.rpartition(".")[0], self.block_name(index)
            if parameter.ndim > 1 and module not in quantizable:
                stored = stored_parameter(self.weights, f"{prefix}.{name}")
                modules.setdefault(f"{prefix}.{module}", []).append(stored)
        return modules

    def load_block(self, index: int) -> nn.Module:
        """A new copy of block `index` with its weights in float32, on the device, its experts separate."""
        block = self._load_fused(index)
        separate(block, self.experts[index])
        return block

    def _load_fused(self, index: int) -> nn.Module:
        """The block as transformers makes it."""
        block = copy.deepcopy(self._blocks[index])
        self._fill(block, self.block_name(index))
        for parameter in block.parameters():
            parameter.data = parameter.data.float()
        return block

    def outer_names(self) -> list[str]:
        """Stored tensors that belong to no block, in stored order; layers for multi-token prediction are no blocks."""
        prefix = f"{self.stored_blocks_name}."
        extra = set(self.mtp_names())
        return [name for name in self.weights.tensors if not name.startswith(prefix) or name in extra]

    def mtp_names(self) -> list[str]:
        """Stored tensors of layers for multi-token prediction, which transformers' model does not have."""
        blocks = tuple(f"{self.block_name(index)}." for index in range(len(self)))
        names = (name for name in self.weights.tensors if not name.startswith(blocks))
        return [name for name in names if useless_reason(name, self.weights.config) == MTP]

    def outer_tensors(self) -> dict[str, Tensor]:
        """The tensors that belong to no block, as they are to be written; a tied head is among them."""
        tensors = {name: self.weights.read(name) for name in self.outer_names()}
        if self.tied and HEAD not in tensors:
            tensors[HEAD] = tensors[f"{self.embedding_name}.weight"].clone()
        return tensors

    def start(self, ids: Tensor) -> tuple[Tensor, list[BlockArguments]]:
        """What the first block receives for token ids [rows, length], and each block's further arguments.

        The arguments are those of one row: masks and positions broadcast over rows.
        """
        hidden = torch.cat([self._embed(row[None]) for row in ids])
        return hidden, [stub.arguments for stub in self._stubs]

    def run_block(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Output of a block for hidden [rows, length, hidden]; `start` must have run with this length."""
        output = block(hidden, **{k: _moved(v, hidden.device) for k, v in self._stubs[index].arguments.items()})
        return output[0] if isinstance(output, tuple) else output

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head on the last block's output [rows, length, hidden]; differentiable."""
        last = self._stubs[-1]
        last.replacement = hidden
        try:
            placeholder = torch.zeros(hidden.shape[:2], dtype=torch.long)
            return self.skeleton(input_ids=placeholder.to(hidden.device), use_cache=False).logits
        finally:
            last.replacement = None

    @property
    def _stubs(self) -> list[BlockStub]:
        return list(self.skeleton.get_submodule(self.blocks_name))

    def _embed(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            self.skeleton.get_decoder()(input_ids=ids.to(self.device), use_cache=False)
        return self._stubs[0].hidden

    def _trace_blocks(self) -> list[tuple[dict[str, Group], tuple[Experts, ...]]]:
        """Groups and experts; the same for blocks with modules and parameters of the same names, types and shapes."""
        known: dict[tuple[Any, ...], tuple[dict[str, Group], tuple[Experts, ...]]] = {}
        config = self.config.get_text_config()
        result = []
        try:
            width = Width(head_dim(config), kv_heads(config) * head_dim(config))
            hidden, _ = self.start(torch.zeros(1, _TRACE_TOKENS, dtype=torch.long))
            for index, empty in enumerate(self._blocks):
                key = tuple(
                    [(n, type(m)) for n, m in empty.named_modules()]
                    + [(n, p.shape) for n, p in empty.named_parameters()]
                )
                if key not in known:
                    block = self._load_fused(index)
                    run = partial(self.run_block, block, index, randomize(block, hidden))
                    known[key] = trace(block, run, width), find_experts(block, run)
                result.append(known[key])
        except CalibrationError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{self.directory}: {type(self.skeleton).__name__} does not run as one decoder block after another "
                f"({error}). {SUPPORTED}"
            ) from error
        if not any(groups or experts for groups, experts in result):
            raise CalibrationError(f"{self.directory}: {no_layers(self._blocks, family(self.config))} {SUPPORTED}")
        return result

    def _load_outer(self) -> None:
        for name, module in list(self.skeleton.named_children()):
            self._fill(module, name)
        if self.tied:
            head, embedding = self.skeleton.get_output_embeddings(), self.skeleton.get_input_embeddings()
            head.weight = embedding.weight
        for name, parameter in self.skeleton.named_parameters():
            if parameter.is_meta:
                raise self.weights.missing(name)
            if parameter.ndim == 1:
                parameter.data = parameter.data.float()
        self._compute_outer_in_float32()

    def _compute_outer_in_float32(self) -> None:
        """Embedding and head stay in their stored dtype, half as large, and are converted when they are used."""
        head, embedding = self.skeleton.get_output_embeddings(), self.skeleton.get_input_embeddings()
        embedding.padding_idx = None  # it only matters to gradients, and must be one of the rows
        embedding.forward = partial(_embed_in_float32, embedding, embedding.forward)
        head.forward = lambda x: nn.functional.linear(
            x, head.weight.float(), None if head.bias is None else head.bias.float()
        )

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Load a module's parameters as stored, and move its buffers; `prefix` is its full name."""
        for name, _ in list(module.named_parameters(remove_duplicate=False)):
            full = f"{prefix}.{name}"
            if self.tied and full == HEAD and full not in self.weights.tensors:
                continue
            owner = module.get_submodule(name.rpartition(".")[0])
            value = read_parameter(self.weights, full).to(self.device)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers()):
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], buffer.to(self.device))


def _embed_in_float32(embedding: nn.Embedding, forward: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """What an embedding with its weights in float32 gives for token ids, multiplied by a number though it may be."""
    stored = embedding.weight
    rows = nn.functional.embedding(ids, stored).float()
    embedding.weight = nn.Parameter(rows.flatten(0, -2), requires_grad=False)
    try:
        return forward(torch.arange(ids.numel(), device=ids.device).view_as(ids))
    finally:
        embedding.weight = stored


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(_moved(v, device) for v in value) if isinstance(value, tuple) else value
