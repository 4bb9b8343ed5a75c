# SPDX-License-Identifier: Apache-2.0
"""The graph of a layer as vLLM stores it: parameters are inputs, there are no guards. For processes of their own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

NAMES = ("weight", "weight_scale", "left_trans", "right_trans", "clip_ratio")


@contextmanager
def layer_of(kind: str, directory: Path) -> Iterator[tuple[Any, Any]]:
    """A loaded layer, and vLLM's configuration; the process has the fused library (kind "fused") or not ("CANN")."""
    from vllm.config import set_current_vllm_config
    from vllm_ascend.ops.linear import AscendColumnParallelLinear

    from tests.linears import load
    from tests.npu.linears import Linear, open_config
    from tests.npu.loading import distributed, engine_config, run_operators_on_cpu
    from tests.npu.processes import MICRO
    from vllm_w4a4_plugin.ops.npu import fused

    # The library is not needed to trace a graph, so it is only said to be there, and no kernel is tried.
    os.environ["VLLM_W4A4_SELF_CHECK"] = "0"
    if kind == "fused":
        fused.unavailable_reason = lambda: ""  # type: ignore[assignment]
    config = engine_config(MICRO)
    linear = Linear(48, 192)
    directory.mkdir(exist_ok=True)
    with distributed(config), set_current_vllm_config(config):
        run_operators_on_cpu()
        layer = AscendColumnParallelLinear(
            linear.features,
            linear.out,
            bias=False,
            quant_config=open_config(directory, {"mlp.up": linear}),
            prefix="model.layers.0.mlp.up",
            params_dtype=torch.bfloat16,
        )
        yield load(layer, {None: linear}), config


def tensors_of(layer: Any) -> list[torch.Tensor]:
    return [getattr(layer, name).data for name in NAMES]


def use_cache(cache: Path, kind: str) -> dict[str, Any]:
    """Run the graphs that are stored in a directory on the tensors of a layer, then store its own graph there.

    Returns:
        `hash`: of what vLLM hashes; `errors`: by file name, "" for a graph that computes what the layer does.
    """
    from torch.fx.experimental.proxy_tensor import make_fx
    from vllm.compilation.caching import aot_compile_hash_factors

    from tests.npu.linears import inputs

    x = inputs(192)
    with layer_of(kind, cache / "checkpoint") as (layer, config):

        def apply(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            traced = SimpleNamespace(**dict(zip(NAMES, tensors, strict=True)))
            return layer.quant_method.scheme.apply(traced, x, None)

        def run(graph: Any) -> str:
            try:
                found = graph(x, *tensors_of(layer))
            except RuntimeError as error:
                return str(error)
            return "" if torch.equal(found, layer(x)[0]) else "a wrong result"

        errors = {file.name: run(torch.load(file, weights_only=False)) for file in cache.glob("*.graph")}
        graph = make_fx(apply, tracing_mode="fake")(x, *tensors_of(layer))
        torch.save(graph, cache / f"{kind}.graph")
        return {"hash": str(aot_compile_hash_factors(config)), "errors": errors}
