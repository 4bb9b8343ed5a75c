# SPDX-License-Identifier: Apache-2.0
"""What `verify` and loading say of a checkpoint, and whether a loaded model holds the stored values."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.model_loader import get_model

from tests.loading import engine_config
from tests.packing import unpacked
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.checkpoint.verify import header_findings, remarks, value_findings
from vllm_w4a4_plugin.quantization.parameters.base import MatrixParameter
from vllm_w4a4_plugin.quantization.parameters.cpu import Int4Parameter
from vllm_w4a4_plugin.quantization.parameters.experts import ExpertsParameter, PackedExpertsParameter

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def findings(directory: Path) -> list[str]:
    """`verify`'s findings, [] for a good checkpoint."""
    try:
        reader = CheckpointReader(directory)
        return list(header_findings(reader)) or list(value_findings(reader))
    except CheckpointError as error:
        return [str(error)]


def unchecked(directory: Path) -> list[str]:
    """What `verify` says that it could not check; [] where it has findings."""
    return [] if findings(directory) else list(remarks(CheckpointReader(directory)))


@dataclass
class Answer:
    """What loading came to.

    Attributes:
        error: None if the model was loaded.
        of_vllm: whether vLLM or transformers refused config.json before the plugin was asked.
        wrong: parameters that do not hold the stored values.
    """

    error: Exception | None = None
    of_vllm: bool = False
    wrong: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether a refusal is in the plugin's words. vLLM's configuration wraps what it catches in its own error."""
        seen, error = set(), self.error
        while error is not None and id(error) not in seen:
            if isinstance(error, CheckpointError):
                return True
            seen.add(id(error))
            errors = error.errors() if hasattr(error, "errors") else []
            if any(isinstance(e.get("ctx", {}).get("error"), CheckpointError) for e in errors):
                return True
            error = error.__cause__ or error.__context__
        return False


@contextmanager
def one_rank() -> Iterator[None]:
    """This process as a tensor-parallel group of its own, for many loads."""
    from vllm.config import VllmConfig

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        ensure_model_parallel_initialized(1, 1, backend="gloo")
    try:
        yield
    finally:
        cleanup_dist_env_and_memory()


def load(directory: Path, **arguments: Any) -> Answer:
    """Load a checkpoint with vLLM's own loader; inside `one_rank`."""
    try:
        config = engine_config(directory, dtype="float32", **arguments)
    except Exception as error:  # anything at all is an answer, good or bad
        answer = Answer(error)
        answer.of_vllm = not answer.is_ours
        return answer
    try:
        with patch("torch.accelerator.empty_cache"), set_current_vllm_config(config):
            model = get_model(vllm_config=config)
    except Exception as error:
        return Answer(error)
    reader = CheckpointReader(directory)
    return Answer(wrong=(*differing(model, reader), *differing_experts(model, reader)))


def differing(model: torch.nn.Module, reader: CheckpointReader) -> Iterator[str]:
    """Parameters whose values are not the stored ones. Those that a kernel keeps in a layout of its own are left out,
    but for our int4 weights, which are packed again here."""
    shards: dict[str, list[str]] = {}
    for name in reader.tensors:
        parent, _, suffix = name.rpartition(".")
        block, _, leaf = parent.rpartition(".")
        whole = next((fused for fused, leaves in FUSED.items() if leaf in leaves), leaf)
        shards.setdefault(f"{block}.{whole}.{suffix}" if block else name, []).append(name)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        leaf = name.split(".")[-2]
        stored = shards.get(name)
        if stored is None or parameter.numel() == 0:
            continue
        order = FUSED.get(leaf, ())
        ordered = sorted(stored, key=lambda n: order.index(n.split(".")[-2])) if stored[1:] else stored
        tensors = [stored_values(reader, n) for n in ordered]
        if not _holds(name, parameter, tensors, parameters):
            yield name


def differing_experts(model: torch.nn.Module, reader: CheckpointReader) -> Iterator[str]:
    """Parameters of experts whose values are not the stored ones; weights are packed again here."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, ExpertsParameter):
            continue
        part = parameter.part
        names = [part.plan.tensor_name(part.suffix, shard) for shard in part.shards]
        tensors = [stored_values(reader, name).to(parameter.dtype) for name in names]
        stored = [t.reshape(len(t) if t.ndim else 1, -1) for t in tensors]  # vectors may be columns
        whole = torch.stack(stored).unflatten(0, (len(part.places), -1)).flatten(1, 2)
        expected = torch.zeros_like(parameter.data)
        for place, matrix in enumerate(whole):
            if isinstance(parameter, PackedExpertsParameter):
                parameter.pack_rows(expected[place], matrix.contiguous(), 0)
            else:
                expected[place] = matrix.reshape(expected[place].shape)
        if not expected.equal(parameter.data):
            yield name


def stored_values(reader: CheckpointReader, name: str) -> torch.Tensor:
    """A stored tensor, with one value per element if it is a packed weight."""
    tensor = reader.load(name)
    return torch.from_numpy(unpacked(tensor.numpy())) if tensor.dtype == torch.uint8 else tensor


def _holds(name: str, parameter: torch.Tensor, stored: list[torch.Tensor], others: dict[str, Any]) -> bool:
    suffix = name.rpartition(".")[2]
    if stored[0].dtype == torch.int8 and not isinstance(parameter, MatrixParameter):
        return True  # vLLM's kernel has packed it
    if suffix == "clip_ratio":
        return all(torch.allclose(parameter, t.float(), rtol=2e-3) for t in stored)
    if suffix in ("left_trans", "right_trans"):
        return parameter.equal(stored[0].to(parameter))
    if isinstance(parameter, Int4Parameter):
        expected = Int4Parameter.zeros(
            (sum(map(len, stored)), stored[0].shape[1]),
            input_parts=1, plan=parameter.plan, suffix="weight", weight_loader=None, on_packed=lambda: None,
        )  # fmt: skip
        first = 0
        for tensor in stored:
            expected._pack(tensor, first)
            first += len(tensor)
        return expected.data.equal(parameter.data)
    flat = torch.cat([t.reshape(-1) for t in stored]).to(parameter.dtype)
    return flat.equal(parameter.reshape(-1)[: flat.numel()])
