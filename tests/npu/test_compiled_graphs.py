# SPDX-License-Identifier: Apache-2.0
"""Graphs that vLLM compiled in an earlier run, when the layers had other kernels: not found, or refused."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.npu import graphs
from vllm_w4a4_plugin.ops.npu import cann, fused


def test_two_processes_with_one_cache(fresh_process: ProcessPoolExecutor, tmp_path: Path) -> None:
    """The second process has no fused library."""
    first, second = (
        fresh_process.submit(graphs.use_cache, tmp_path, kind).result(timeout=300) for kind in ("fused", "CANN")
    )
    assert first["hash"] != second["hash"], "vLLM would look for the other kernel's graph"
    assert "vLLM reused a graph" in second["errors"]["fused.graph"]
    assert "torch_compile_cache" in second["errors"]["fused.graph"]


@pytest.mark.usefixtures("config")
def test_cann_refuses_the_weights_of_the_fused_kernel() -> None:
    weight = fused.arrange_weight_(torch.zeros(48, 24, dtype=torch.int32))
    assert weight.shape == (3, 3, 16, 8)
    q, scale = torch.zeros(1, 24, dtype=torch.int32), torch.ones(1)
    with pytest.raises(RuntimeError, match="vLLM reused a graph"):
        cann.int4_linear(q, scale, weight, torch.ones(48), None, torch.bfloat16)
