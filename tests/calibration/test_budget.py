# SPDX-License-Identifier: Apache-2.0
"""The budget line: its claim for a large model, and its truth for a small one."""

from types import SimpleNamespace

import pytest

from vllm_w4a4_plugin.calibration.budget import estimate
from vllm_w4a4_plugin.calibration.recipe import load_recipe
from vllm_w4a4_plugin.checkpoint import TensorInfo

QWEN3_32B = SimpleNamespace(
    hidden_size=5120,
    intermediate_size=25600,
    num_hidden_layers=64,
    head_dim=128,
    num_attention_heads=64,
    num_key_value_heads=8,
)
OUTER = {
    name: TensorInfo(name, "model-00001.safetensors", "BF16", (151936, 5120))
    for name in ("model.embed_tokens.weight", "lm_head.weight")
}


def test_a_32b_model_fits_into_32_gb() -> None:
    need = estimate(QWEN3_32B, OUTER, load_recipe("tutorial"), 8192, gradients=True, device="cpu")
    assert 10e9 < need.memory < 32e9
    # 64 blocks: 0.25 GB of int4-in-int8 and int8 codes and 0.26 GB of bf16 down_proj each, kept twice while writing.
    assert 2 * 35e9 < need.disk < 2 * 60e9
    assert need.seconds > 3600


@pytest.mark.parametrize("tokens", [1024, 8192])
def test_memory_grows_with_tokens(tokens: int) -> None:
    small, large = (
        estimate(QWEN3_32B, OUTER, load_recipe("tutorial"), t, gradients=False, device="cpu").memory
        for t in (tokens, 2 * tokens)
    )
    assert large > small
