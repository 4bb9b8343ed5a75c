# SPDX-License-Identifier: Apache-2.0
"""Which experts of transformers can be taken apart, and what they are called in the files."""

from pathlib import Path

import pytest
import torch

from tests.families import write_model
from vllm_w4a4_plugin.calibration.model.experts import SeparateExperts, find_experts
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.calibration.model.structure import Experts

COUNT, HIDDEN, INTERMEDIATE = 3, 8, 6


class Fused(torch.nn.Module):
    """Experts as transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(COUNT, 2 * INTERMEDIATE, HIDDEN))
        self.down_proj = torch.nn.Parameter(torch.randn(COUNT, HIDDEN, INTERMEDIATE))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = []
        for token, chosen, factors in zip(x, ids, weights, strict=True):
            parts = [f * self.expert(token, int(number)) for number, f in zip(chosen, factors, strict=True)]
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows)

    def expert(self, token: torch.Tensor, number: int) -> torch.Tensor:
        gate, up = (self.gate_up_proj[number] @ token).chunk(2)
        return self.down_proj[number] @ (torch.nn.functional.silu(gate) * up)


class Interleaved(Fused):
    def expert(self, token: torch.Tensor, number: int) -> torch.Tensor:
        both = self.gate_up_proj[number] @ token
        return self.down_proj[number] @ (torch.nn.functional.silu(both[::2]) * both[1::2])


class WeightsFirst(Fused):
    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(x, ids, weights)


class Biased(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj_bias = torch.nn.Parameter(torch.zeros(COUNT, HIDDEN))


def found(fused: Fused) -> tuple[Experts, ...]:
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(9, HIDDEN, generator=generator), torch.rand(9, 2, generator=generator)
    ids = torch.rand(9, COUNT, generator=generator).topk(2).indices
    block = torch.nn.ModuleDict({"experts": fused})
    arguments = (x, weights, ids) if isinstance(fused, WeightsFirst) else (x, ids, weights)
    return find_experts(block, lambda: block["experts"](*arguments))


def test_usual_experts_are_found() -> None:
    assert found(Fused()) == (Experts("experts", COUNT),)


@pytest.mark.parametrize("kind", [Interleaved, WeightsFirst, Biased])
def test_experts_that_compute_something_else_are_not(kind: type[Fused]) -> None:
    assert found(kind()) == ()


def test_separate_experts_share_the_weights() -> None:
    fused = Fused()
    separate = SeparateExperts(fused.gate_up_proj.data, fused.down_proj.data)
    separate[1].up_proj.weight.zero_()
    assert not fused.gate_up_proj[1, INTERMEDIATE:].any()
    assert fused.gate_up_proj[1, :INTERMEDIATE].all()


def test_experts_with_another_activation_stay_float(tmp_path: Path) -> None:
    model = StreamedModel(write_model("qwen3_moe", tmp_path / "float", hidden_act="gelu"))
    assert model.experts == [(), ()]
    assert "model.layers.0.mlp.experts" in model.float_names()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.2.up_proj"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3"),
    ],
)
def test_names_in_the_files(family: str, name: str, tmp_path: Path) -> None:
    model = StreamedModel(write_model(family, tmp_path / "float"))
    (experts,) = model.experts[1]
    assert experts == Experts("mlp.experts", 4)
    assert model.expert_names(1, experts)[7] == name
    assert model.stored_linear(0, "self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
