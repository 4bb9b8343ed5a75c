# SPDX-License-Identifier: Apache-2.0
"""The models for llama.cpp have the tensors that llama.cpp knows of their architecture, in its shapes."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from benchmarks import llama
from benchmarks.shapes import Experts, Model

DENSE = Model("small", hidden=192, intermediate=512, heads=4, kv_heads=2, head_dim=64, vocabulary=512)
MIXTURE = replace(DENSE, intermediate=96, experts=Experts("small", count=5, top_k=2, hidden=192, intermediate=96))


@pytest.mark.parametrize(
    ("model", "architecture"), [(DENSE, gguf.MODEL_ARCH.QWEN3), (MIXTURE, gguf.MODEL_ARCH.QWEN3MOE)]
)
def test_tensors_are_those_of_the_architecture(model: Model, architecture: gguf.MODEL_ARCH, tmp_path: Path) -> None:
    llama.write(tmp_path / "model.gguf", model, 2)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.architecture"].contents() == gguf.MODEL_ARCH_NAMES[architecture]
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[architecture]}
    # The head is tied, and the rotary embedding has no frequencies of its own.
    names = {name.format(bid=index) for name in known - {"output", "rope_freqs"} for index in range(2)}
    assert {tensor.name for tensor in reader.tensors} == {f"{name}.weight" for name in names}


def test_experts_are_one_tensor_per_projection(tmp_path: Path) -> None:
    llama.write(tmp_path / "model.gguf", MIXTURE, 2)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["qwen3moe.expert_count"].contents() == 5
    assert reader.fields["qwen3moe.expert_used_count"].contents() == 2
    # ggml's order: the input features first.
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.ffn_up_exps.weight"] == shapes["blk.1.ffn_gate_exps.weight"] == [192, 96, 5]
    assert shapes["blk.1.ffn_down_exps.weight"] == [96, 192, 5]
    assert shapes["blk.1.ffn_gate_inp.weight"] == [192, 5]
