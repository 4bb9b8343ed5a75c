# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face causal language model whose decoder blocks are loaded one at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader, TensorInfo

from .errors import CalibrationError
from .structure import Group, Role, trace

HEAD = "lm_head.weight"

BlockArguments = dict[str, Any]

_TRACE_TOKENS = 8


class StreamedModel:
    """Embedding, final norm and head in memory; decoder blocks read from the safetensors shards on request.

    Arithmetic is float32: on CPU the fastest, and it adds no rounding of its own to what is measured.

    Args:
        directory: of the float model.
        device: where blocks run.
        trust_remote_code: run the model's own Python code.

    Attributes:
        groups: of every block.

    Raises:
        CalibrationError: not a causal language model of supported structure, or tensors are missing.
    """

    def __init__(self, directory: Path, device: str = "cpu", trust_remote_code: bool = False) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.directory, self.device = directory, torch.device(device)
        self.tensors = _stored_tensors(directory)
        try:
            self.config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
            if "quantize" in self.config.to_dict() or getattr(self.config, "quantization_config", None):
                raise CalibrationError(f"{directory}: config.json says that this model is quantized already.")
            with _parameters_on_meta():
                self.skeleton = AutoModelForCausalLM.from_config(
                    self.config, trust_remote_code=trust_remote_code, attn_implementation="sdpa"
                ).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CalibrationError(f"{directory}: transformers cannot build this model: {error}") from None
        self.skeleton.requires_grad_(False)
        self.blocks_name, blocks = self._find_blocks()
        self._blocks = list(blocks)
        parent = self.skeleton.get_submodule(self.blocks_name.rpartition(".")[0])
        self._stubs = [_Stub(block) for block in self._blocks]
        setattr(parent, self.blocks_name.rpartition(".")[2], nn.ModuleList(self._stubs))
        self.tied = bool(self.config.get_text_config().tie_word_embeddings)
        self._load_outer()
        self.groups = self._trace_blocks()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.config.get_text_config().hidden_size

    def block_name(self, index: int) -> str:
        """Full name of block `index`, e.g. `model.layers.3`."""
        return f"{self.blocks_name}.{index}"

    def linear_names(self) -> list[str]:
        """Full names of the linear layers of all blocks."""
        return [
            f"{self.block_name(index)}.{name}"
            for index, block in enumerate(self._blocks)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        ]

    def load_block(self, index: int) -> nn.Module:
        """Block `index` with its weights in float32, a fresh copy on the device."""
        import copy

        block = copy.deepcopy(self._blocks[index])
        self._fill(block, self.block_name(index), self.device)
        return block

    def stored(self, name: str) -> Tensor:
        """One tensor as stored."""
        return _read(self.directory, self.tensors[name])

    def outer_names(self) -> list[str]:
        """Stored tensors that belong to no block, in stored order."""
        return [name for name in self.tensors if not name.startswith(self.blocks_name + ".")]

    def outer_tensors(self) -> dict[str, Tensor]:
        """The tensors that belong to no block, as they are to be written; a tied head is among them."""
        tensors = {name: self.stored(name) for name in self.outer_names()}
        if self.tied and HEAD not in tensors:
            tensors[HEAD] = tensors[f"{self.embedding_name}.weight"].clone()
        return tensors

    @property
    def embedding_name(self) -> str:
        """Name of the token embedding."""
        embedding = self.skeleton.get_input_embeddings()
        return next(name for name, module in self.skeleton.named_modules() if module is embedding)

    def start(self, ids: Tensor) -> tuple[Tensor, list[BlockArguments]]:
        """What the first block receives for token ids [rows, length], and each block's further arguments.

        The arguments are those of one row: masks and positions broadcast over rows.
        """
        hidden = torch.cat([self._run(row[None]) for row in ids])
        return hidden, [stub.arguments for stub in self._stubs]

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head on the last block's output [rows, length, hidden]; differentiable."""
        self._stubs[-1].replacement = hidden
        try:
            placeholder = torch.zeros(hidden.shape[:2], dtype=torch.long)
            return self.skeleton(input_ids=placeholder.to(hidden.device), use_cache=False).logits
        finally:
            self._stubs[-1].replacement = None

    def run_block(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Output of a block for hidden [rows, length, hidden]; `start` must have run with this length."""
        output = block(hidden, **{k: _moved(v, hidden.device) for k, v in self._stubs[index].arguments.items()})
        return output[0] if isinstance(output, tuple) else output

    def _run(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            self.skeleton.get_decoder()(input_ids=ids.to(self.device), use_cache=False)
        return self._stubs[0].hidden

    def _find_blocks(self) -> tuple[str, nn.ModuleList]:
        count = getattr(self.config.get_text_config(), "num_hidden_layers", None)
        found = [
            (name, module)
            for name, module in self.skeleton.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if len(found) != 1:
            raise CalibrationError(
                f"{self.directory}: expected one list of {count} decoder blocks in {type(self.skeleton).__name__}, "
                f"found {len(found)}. Only dense decoder-only language models can be quantized."
            )
        return found[0]

    def _trace_blocks(self) -> list[dict[Role, Group]]:
        """Blocks with modules and parameters of the same names, types and shapes have the same groups."""
        known: dict[tuple[Any, ...], dict[Role, Group]] = {}
        result = []
        try:
            hidden, _ = self.start(torch.arange(_TRACE_TOKENS)[None])
            for index, empty in enumerate(self._blocks):
                key = tuple(
                    [(n, type(m)) for n, m in empty.named_modules()]
                    + [(n, p.shape) for n, p in empty.named_parameters()]
                )
                if key not in known:
                    block = StreamedModel.load_block(self, index)  # as stored, whatever a subclass makes of it
                    run = partial(self.run_block, block, index, hidden)
                    known[key] = trace(block, run, f"{self.directory}: {self.block_name(index)}")
                result.append(known[key])
        except CalibrationError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{self.directory}: {type(self.skeleton).__name__} does not run as one decoder block after another "
                f"({error}). Only dense decoder-only language models can be quantized."
            ) from error
        return result

    def _load_outer(self) -> None:
        for name, module in list(self.skeleton.named_children()):
            self._fill(module, name, self.device, skip=self.blocks_name)
        if self.tied:
            head, embedding = self.skeleton.get_output_embeddings(), self.skeleton.get_input_embeddings()
            head.weight = embedding.weight
        self._compute_outer_in_float32()
        for name, parameter in self.skeleton.named_parameters():
            if parameter.is_meta and not name.startswith(self.blocks_name):
                raise CalibrationError(_missing(self.directory, name))

    def _compute_outer_in_float32(self) -> None:
        """Embedding and head keep their stored dtype, in which they are half as large, until they are used."""
        head = self.skeleton.get_output_embeddings()
        self.skeleton.get_input_embeddings().register_forward_hook(lambda module, args, output: output.float())
        head.forward = lambda x: nn.functional.linear(
            x, head.weight.float(), None if head.bias is None else head.bias.float()
        )

    def _fill(self, module: nn.Module, prefix: str, device: torch.device, skip: str | None = None) -> None:
        for name, _ in list(module.named_parameters(remove_duplicate=False)):
            full = f"{prefix}.{name}"
            if skip and full.startswith(skip + "."):
                continue
            if full not in self.tensors:
                if self.tied and full == HEAD:
                    continue
                raise CalibrationError(_missing(self.directory, full))
            owner = module.get_submodule(name.rpartition(".")[0])
            value = self.stored(full).to(device)
            if skip is None or value.ndim == 1:
                value = value.float()
            setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers()):
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], buffer.to(device))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(_moved(v, device) for v in value) if isinstance(value, tuple) else value


class _Stub(nn.Module):
    """Stands where a block was: notes what it is called with and returns its input, or a given replacement."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
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


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without storage; buffers (rotary frequencies) are real."""
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


def _stored_tensors(directory: Path) -> dict[str, TensorInfo]:
    if not (directory / "config.json").is_file():
        raise CalibrationError(f"{directory}: no config.json there; give the directory of a Hugging Face model.")
    if not list(directory.glob("*.safetensors")):
        raise CalibrationError(
            f"{directory}: no *.safetensors file there. Weights in another format must be converted first, e.g. with "
            "transformers' save_pretrained()."
        )
    return CheckpointReader(directory).tensors


def _missing(directory: Path, name: str) -> str:
    return (
        f"{directory}: tensor {name} is not in the model's files. Either they are incomplete, or transformers stores "
        "this kind of model under other names (mixture of experts, multimodal), which cannot be quantized."
    )


def _read(directory: Path, info: TensorInfo) -> Tensor:
    try:
        with safe_open(directory / info.file, framework="pt") as shard:
            return shard.get_tensor(info.name)
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{directory / info.file}: tensor {info.name} cannot be read: {error}") from None
