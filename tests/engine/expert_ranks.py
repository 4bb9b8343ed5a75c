# SPDX-License-Identifier: Apache-2.0
"""What each of two rank processes does with the experts of a checkpoint."""

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_reduce

from tests.loading import loaded_model
from vllm_w4a4_plugin.checkpoint import CheckpointReader

RANKS = 2
Tensors = dict[str, torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""x, weights and ids."""


def outputs(directory: Path, batch: Batch, **arguments: Any) -> list[list[list[torch.Tensor]]]:
    """By rank and layer, what the experts give for a batch after the ranks' parts were added up.

    And then the same from other weights, those of the experts in reverse order, that were loaded in place, and from the
    first ones again.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = tuple(tensor.tolist() for tensor in batch)
    with multiprocessing.get_context("spawn").Pool(RANKS) as pool:
        found = pool.starmap(_outputs, [(directory, rank, port, values, arguments) for rank in range(RANKS)])
    return [[[torch.tensor(layer) for layer in layers] for layers in loads] for loads in found]


def reversed_experts(tensors: Tensors) -> Tensors:
    """The same checkpoint with the experts of each layer in reverse order."""
    count = 1 + max(int(name.partition(".experts.")[2].partition(".")[0]) for name in tensors if ".experts." in name)
    result = {}
    for name, tensor in tensors.items():
        head, found, rest = name.partition(".experts.")
        number, _, suffix = rest.partition(".")
        result[f"{head}.experts.{count - 1 - int(number)}.{suffix}" if found else name] = tensor
    return result


def _outputs(directory: Path, rank: int, port: int, batch: Any, arguments: dict[str, Any]) -> list[Any]:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "VLLM_DIST_IDENT": f"w4a4_{port}"}  # as vLLM's executor does
    x, weights = (torch.tensor(values) for values in batch[:2])
    ids = torch.tensor(batch[2], dtype=torch.int32)
    reader = CheckpointReader(directory)
    tensors = {name: reader.load(name) for name in reader.tensors}
    with loaded_model(directory, rank, port, tensor_parallel_size=RANKS, **arguments) as model:

        def compute() -> list[Any]:
            parts = [layer.mlp.experts.routed_experts.forward_modular(x, weights, ids) for layer in model.model.layers]
            return [tensor_model_parallel_all_reduce(part).tolist() for part in parts]

        results = [compute()]
        for stored in (reversed_experts(tensors), tensors):
            model.load_weights(iter(stored.items()))
            results.append(compute())
        return results
