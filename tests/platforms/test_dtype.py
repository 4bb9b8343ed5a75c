# SPDX-License-Identifier: Apache-2.0
"""The dtype that a checkpoint is computed in, on CPUs with and without 16-bit float instructions."""

import pytest
import torch

from tests.conftest import MICRO
from tests.loading import engine_config
from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.platforms import dtype as dtypes


@pytest.fixture
def slow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "slow_on_this_cpu", lambda dtype: dtype == torch.bfloat16)


@pytest.mark.usefixtures("slow_bfloat16")
@pytest.mark.parametrize("quantization", ["ascend", None])
def test_float32_replaces_what_the_cpu_lacks(quantization: str | None) -> None:
    config = engine_config(MICRO, dtype="auto", quantization=quantization)
    assert config.model_config.dtype == torch.float32


@pytest.mark.feature("`--dtype` by name")
@pytest.mark.usefixtures("slow_bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_asked_for_by_name_stays(dtype: torch.dtype) -> None:
    """Also the checkpoint's own, which vLLM would choose for `auto`, and after an engine with `auto`."""
    engine_config(MICRO, dtype="auto")
    assert engine_config(MICRO, dtype=str(dtype).removeprefix("torch.")).model_config.dtype == dtype


@pytest.mark.usefixtures("slow_bfloat16")
def test_dtype_is_kept_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "affordable", lambda extra_bytes: False)
    assert engine_config(MICRO, dtype="auto").model_config.dtype == torch.bfloat16


def test_dtype_is_kept_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "slow_on_this_cpu", lambda dtype: False)
    assert engine_config(MICRO, dtype="auto").model_config.dtype == torch.bfloat16


def test_cost_counts_what_widens() -> None:
    reader = CheckpointReader(MICRO)
    widened = sum(reader.load(name).numel() for name in reader.tensors if reader.load(name).dtype == torch.bfloat16)
    assert dtypes.cost_of_float32(reader.tensors.values()) == 2 * widened > 0


def test_a_cost_beyond_memory_is_not_affordable() -> None:
    assert dtypes.affordable(0)
    assert not dtypes.affordable(2**60)
