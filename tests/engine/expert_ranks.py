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

RANKS = 2
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""x, weights and ids."""


def outputs(directory: Path, batch: Batch, **arguments: Any) -> list[list[torch.Tensor]]:
    """By rank and layer, what the experts give for a batch after the ranks' parts were added up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = tuple(tensor.tolist() for tensor in batch)
    with multiprocessing.get_context("spawn").Pool(RANKS) as pool:
        found = pool.starmap(_outputs, [(directory, rank, port, values, arguments) for rank in range(RANKS)])
    return [[torch.tensor(layer) for layer in layers] for layers in found]


def _outputs(directory: Path, rank: int, port: int, batch: Any, arguments: dict[str, Any]) -> list[Any]:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "VLLM_DIST_IDENT": f"w4a4_{port}"}  # as vLLM's executor does
    x, weights = (torch.tensor(values) for values in batch[:2])
    ids = torch.tensor(batch[2], dtype=torch.int32)
    with loaded_model(directory, rank, port, tensor_parallel_size=RANKS, **arguments) as model:
        return [
            tensor_model_parallel_all_reduce(layer.mlp.experts.routed_experts.forward_modular(x, weights, ids)).tolist()
            for layer in model.model.layers
        ]
