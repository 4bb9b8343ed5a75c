# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of made-up linears, opened as vLLM opens one, at any rank of a tensor-parallel group."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear

from tests.quantization.linears import PACKED, Linear
from vllm_w4a4_plugin.quantization.config import AscendW4A4Config


@pytest.fixture
def vllm_context() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., AscendW4A4Config]:
    """Write the linears as a checkpoint directory and open it as vLLM does."""

    def make(**linears: Linear) -> AscendW4A4Config:
        tensors, kinds = {}, {}
        for name, linear in linears.items():
            for suffix, tensor in linear.tensors().items():
                tensors[f"m.{name}.{suffix}"] = tensor
                kinds[f"m.{name}.{suffix}"] = "FLOAT" if suffix == "bias" else linear.kind
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "quant_model_description.json").write_text(json.dumps({"version": "1.0.0", **kinds}))
        config = AscendW4A4Config()
        config.maybe_update_config(str(tmp_path))
        config.packed_modules_mapping = PACKED
        return config

    return make


@pytest.fixture
def at_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend to be a rank of a tensor-parallel group."""

    def pretend(rank: int, size: int) -> None:
        from vllm.model_executor import parameter

        for module in (vllm_linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        from vllm_w4a4_plugin.quantization import report

        monkeypatch.setattr(report, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(vllm_linear, "tensor_model_parallel_all_reduce", lambda x: x)

    pretend(0, 1)
    return pretend
