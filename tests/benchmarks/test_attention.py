# SPDX-License-Identifier: Apache-2.0
"""Long prompts: the operator that is timed computes attention whatever its options, and what the page says."""

import pytest
import torch

from benchmarks import attention
from tests.benchmarks.test_start_up import MACHINE

TOKENS = 70


def by_formula() -> torch.Tensor:
    """Causal attention over the benchmark's own tensors, in float64."""
    model = attention.MODEL
    generator = torch.Generator().manual_seed(0)
    counts = (model.heads, model.kv_heads, model.kv_heads)
    q, k, v = (torch.randn(TOKENS, n, model.head_dim, generator=generator).double().transpose(0, 1) for n in counts)
    k, v = (x.repeat_interleave(model.heads // model.kv_heads, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * model.head_dim**-0.5
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize(("block", "step"), [(16, 70), (32, 70), (128, 70), (64, 33)])
def test_every_option_computes_attention(block: int, step: int) -> None:
    attention.import_vllm_kernels()
    found = attention.attention(block, step, "float32", TOKENS)()
    assert (found.double() - by_formula()).norm() < 1e-4 * by_formula().norm()


def test_the_page() -> None:
    shares = {"bfloat16": [{"tokens": 1024, "seconds": 1.5, "attention": 0.25, "linears": 0.5}]}
    options = [
        {**attention.DEFAULT, "seconds": 2.0, "speedup": 1.0},
        {**attention.DEFAULT, "block": 32, "seconds": 1.0, "speedup": 2.0},
    ]
    result = {"machine": MACHINE | {"load": 0.1}, "shares": shares, "options": options}
    lines = attention.page(result).splitlines()
    assert "| bfloat16 | 1024 | 1.50 | 25% | 50% | 25% |" in lines
    assert lines[-1] == "| 32 | 4096 | bfloat16 | 2.00x |"
