# SPDX-License-Identifier: Apache-2.0
"""What a row-parallel layer computes in a group of real processes, each with a part of every token."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    get_tensor_model_parallel_rank,
    init_distributed_environment,
)
from vllm.model_executor.layers.linear import RowParallelLinear

from tests.linears import load, open_config
from tests.quantization.linears import IN
from tests.quantization.row_linears import TYPES, made
from vllm_w4a4_plugin.quantization.config import AscendW4A4Config

OF_CODES = ("W4A4_FLATQUANT_DYNAMIC", "W4A4_DYNAMIC", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "W8A8_FLATQUANT_DYNAMIC")
"""Types of which a weight of ones and zeros gives the quantized activations."""
DTYPES = (torch.float32, torch.bfloat16)
SIZES = (4, 2, 1)
OUT = 40


def tokens(dtype: torch.dtype) -> torch.Tensor:
    """Some with parts of very different magnitudes, as outliers make them, one of zeros, and one that is not finite."""
    x = torch.randn(37, IN, generator=torch.Generator().manual_seed(7))
    x[::3, : IN // 4] *= 30
    x[5] = 0
    x[6, 3] = torch.inf
    return x.to(dtype)


def linear(kind: str, of_codes: bool) -> Any:
    """A linear of random weights, or one whose outputs are the quantized activations themselves, code times scale."""
    result = made(kind, IN if of_codes else OUT)
    if of_codes:
        stored = result.tensors()
        stored["weight"].copy_(torch.eye(IN))
        stored["weight_scale"].fill_(1)
    return result


def outputs(directory: Path) -> dict[Any, torch.Tensor]:
    """The whole layer's output for every kind, dtype and kind of weights, on each rank of the group."""
    found = {}
    for kind in TYPES:
        for of_codes in (False, True) if kind in OF_CODES else (False,):
            stored = linear(kind, of_codes)
            config = open_config(AscendW4A4Config(), directory, {"m.proj": stored})
            for dtype in DTYPES:
                layer = RowParallelLinear(
                    IN, IN if of_codes else OUT, bias=False, params_dtype=dtype, quant_config=config, prefix="m.proj"
                )
                layer.input_is_parallel = False  # it takes its part of the whole tokens itself
                load(layer, {None: stored})
                found[kind, of_codes, dtype] = layer(tokens(dtype))[0]
    return found


def run(rank: int, port: int, directory: Path) -> None:
    """One of max(SIZES) processes; writes its outputs in groups of each size, and its rank in the group."""
    torch.set_num_threads(1)
    os.environ["VLLM_DIST_IDENT"] = str(port)
    own = directory / str(rank)
    own.mkdir()
    world = max(SIZES)
    results = {}
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        for size in SIZES:
            ensure_model_parallel_initialized(size, world // size, backend="gloo")
            results[size] = (get_tensor_model_parallel_rank(), outputs(own))
            destroy_model_parallel()
    torch.save(results, directory / f"{rank}.pt")


def run_all(port: int, directory: Path) -> list[dict[int, Any]]:
    """What each process wrote."""
    torch.multiprocessing.spawn(run, (port, directory), nprocs=max(SIZES))
    return [torch.load(directory / f"{rank}.pt") for rank in range(max(SIZES))]
