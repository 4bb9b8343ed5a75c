# SPDX-License-Identifier: Apache-2.0
"""Sizes against published ones, and against what a checkpoint's files and arithmetic give."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import MICRO
from vllm_w4a4_plugin.capacity.devices import GIB, find_device
from vllm_w4a4_plugin.capacity.memory import RUNTIME_BYTES, Serving, plan_memory
from vllm_w4a4_plugin.capacity.model import read_model
from vllm_w4a4_plugin.capacity.partition import sizes_on_rank
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec

DEVICE = find_device("910B2")


def test_qwen3_32b_from_its_config(config_only: Callable[..., Path]) -> None:
    """Users report 32.6 GB, and a peak of 42.7 GB where int4 is unpacked while loading (vllm-ascend #2296)."""
    model = read_model(config_only())
    memory = plan_memory(model, DEVICE, Serving())
    assert memory.total_weights == pytest.approx(32.6e9, rel=0.02)
    assert memory.unpacked_peak == pytest.approx(42.7e9, rel=0.02)
    assert memory.total_weights < memory.loading_peak < 1.02 * memory.total_weights
    # Eleven shards of at most 4 GB.
    assert model.stored_bytes == pytest.approx(42.7e9, rel=0.02)
    int4 = 64 * (5120 * 10240 + 5120 * 51200) / 2
    assert memory.weights["W4A4_FLATQUANT_DYNAMIC"] == pytest.approx(int4, rel=0.02)
    assert memory.weights["W8A8_DYNAMIC"] == pytest.approx(64 * 8192 * 5120, rel=0.02)
    assert memory.weights["FLOAT"] == 2 * (64 * 25600 * 5120 + 151936 * 5120)
    assert memory.weights["embeddings and norms"] == 2 * (151936 * 5120 + 64 * (2 * 5120 + 2 * 128) + 5120)


def test_kv_cache(config_only: Callable[..., Path]) -> None:
    memory = plan_memory(read_model(config_only()), DEVICE, Serving())
    assert memory.kv_per_token == 2 * 64 * 8 * 128 * 2
    assert memory.kv_left == int(0.9 * 64 * GIB) - memory.total_weights - memory.activations - RUNTIME_BYTES
    assert memory.kv_tokens == memory.kv_left // memory.kv_per_token


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_devices_share(config_only: Callable[..., Path], ranks: int) -> None:
    model = read_model(config_only())
    whole, part = (plan_memory(model, DEVICE, Serving(n)) for n in (1, ranks))
    assert part.kv_per_token == whole.kv_per_token // ranks
    for kind in ("W4A4_FLATQUANT_DYNAMIC", "W8A8_DYNAMIC", "FLOAT"):
        # Transforms, and the scales of row-parallel layers, are on every device.
        assert whole.weights[kind] / ranks <= part.weights[kind] <= 1.02 * whole.weights[kind] / ranks


def test_heads_are_copied_beyond_their_number(config_only: Callable[..., Path]) -> None:
    model = read_model(config_only())
    k_proj = LinearSpec("model.layers.0.self_attn.k_proj", QuantType.FLOAT, 1024, 5120)
    assert sizes_on_rank(k_proj, model, 16) == (128, 5120)
    assert plan_memory(model, DEVICE, Serving(16)).kv_per_token == 2 * 64 * 128 * 2
    with pytest.raises(CheckpointError, match="8 key-value heads cannot be shared evenly by 12"):
        sizes_on_rank(k_proj, model, 12)


def test_what_cannot_be_divided_is_refused(config_only: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"layer model\.layers\.0\..*cannot be divided over 3"):
        plan_memory(read_model(config_only()), DEVICE, Serving(3))


def test_a_checkpoint_is_read_from_its_headers() -> None:
    model, reader = read_model(MICRO), CheckpointReader(MICRO)
    assert model.stored_bytes == sum(info.nbytes for info in reader.tensors.values())
    assert len(model.linears) == 14
    q_proj = next(linear for linear in model.linears if linear.name == "model.layers.0.self_attn.q_proj")
    assert (q_proj.output_size, q_proj.input_size, q_proj.left, q_proj.right) == (256, 192, 12, 16)
    norms = sum(info.nbytes for name, info in reader.tensors.items() if "norm" in name)
    assert model.other_bytes == norms


def test_headers_and_config_agree(tmp_path: Path) -> None:
    """The micro checkpoint follows the tutorial's recipe."""
    (tmp_path / "config.json").write_text((MICRO / "config.json").read_text())
    planned, read = read_model(tmp_path), read_model(MICRO)
    assert sorted(planned.linears, key=str) == sorted(read.linears, key=str)
    assert planned.head == read.head
    assert planned.other_bytes == read.other_bytes
    assert planned.stored_bytes == read.stored_bytes


def test_models_that_cannot_be_planned(config_only: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="with experts"):
        read_model(config_only(num_experts=128))
    with pytest.raises(CheckpointError, match="hidden_size is missing"):
        read_model(config_only(hidden_size=None))
    with pytest.raises(CheckpointError, match="unknown device '910A'"):
        find_device("910A")


def test_a_vision_tower_cannot_be_planned_without_weights(config_only: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="vision-language model can only be planned from its quantized weights"):
        read_model(config_only(vision_config={"depth": 27}))
