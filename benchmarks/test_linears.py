# SPDX-License-Identifier: Apache-2.0
"""The same linear layers under pytest-benchmark, to compare commits:

pytest benchmarks --benchmark-autosave; pytest benchmarks --benchmark-compare
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .kernels import import_vllm_kernels
from .peers import PEERS, Unavailable
from .shapes import MODELS, Linear, Model

CASES = [(model, linear) for model in MODELS for linear in model.linears]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("tokens", [1, 16, 256])
@pytest.mark.parametrize(("model", "linear"), CASES, ids=[f"{model.name}-{linear.name}" for model, linear in CASES])
def test_linear(benchmark: BenchmarkFixture, model: Model, linear: Linear, tokens: int, peer: str) -> None:
    import_vllm_kernels()
    try:
        prepared = PEERS[peer](linear)
    except Unavailable as reason:
        pytest.skip(str(reason))
    x = torch.randn(tokens, linear.input_size, dtype=prepared.dtype)
    benchmark.group = f"{model.name} {linear}, {tokens} tokens"
    y = benchmark.pedantic(prepared.run, args=(x,), rounds=7, warmup_rounds=1)
    assert y.shape == (tokens, linear.output_size)
