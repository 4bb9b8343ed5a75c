# SPDX-License-Identifier: Apache-2.0
"""Structure tracing on real transformers blocks: what is found, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.calibration.conftest import FAMILIES
from vllm_w4a4_plugin.calibration.errors import CalibrationError
from vllm_w4a4_plugin.calibration.model.rotated import RotatedModel
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.calibration.model.structure import Group, Role, Source

# A gated delta net, then attention whose output is gated channel by channel, both with experts.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
NEXT: dict[str, Any] = {
    **EXPERTS,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, float_model: Callable[..., Path]) -> None:
    groups, second = StreamedModel(float_model(family)).groups
    assert second == groups
    attention, mlp = "self_attn.", "mlp."
    assert groups[Role.QKV] == Group(
        Role.QKV, (attention + "q_proj", attention + "k_proj", attention + "v_proj"), "input_layernorm"
    )
    # A bias of v is part of what o receives, so v is its source with or without one.
    values = Source(attention + "v_proj", 0, 48, 24, mixes=True)
    assert groups[Role.O] == Group(Role.O, (attention + "o_proj",), None, values)
    assert groups[Role.GATE_UP] == Group(Role.GATE_UP, (mlp + "gate_proj", mlp + "up_proj"), "post_attention_layernorm")
    assert groups[Role.DOWN] == Group(Role.DOWN, (mlp + "down_proj",), None, Source(mlp + "up_proj", 0, 160, 160))


PARALLEL = {"pad_token_id": 0}  # Cohere: attention and MLP have one input, so neither can have the norm for itself


@pytest.mark.parametrize(
    ("family", "changes", "norms", "sources"),
    [
        ("gemma", {}, {"qkv": 1.0, "gate_up": 1.0}, {"o": ("v_proj", 0, True), "down": ("up_proj", 0, False)}),
        (
            "phi3",
            {"pad_token_id": 0},
            {"qkv": 0.0, "gate_up": 0.0},
            {"o": ("qkv_proj", 144, True), "down": ("gate_up_proj", 160, False)},
        ),
        ("cohere", PARALLEL, {}, {"o": ("v_proj", 0, True), "down": ("up_proj", 0, False)}),
        ("olmo", {}, {}, {"o": ("v_proj", 0, True), "down": ("up_proj", 0, False)}),
        ("stablelm", {}, {}, {"o": ("v_proj", 0, True), "down": ("up_proj", 0, False)}),
        ("starcoder2", {}, {}, {"o": ("v_proj", 0, True)}),
        ("olmoe", EXPERTS, {"qkv": 0.0}, {"o": ("v_proj", 0, True)}),
        ("qwen3_next", NEXT, {"qkv": 1.0}, {"o": ("v_proj", 0, False), "down": ("up_proj", 0, False)}),
    ],
)
def test_where_a_transform_is_folded(
    family: str,
    changes: dict[str, Any],
    norms: dict[str, float],
    sources: dict[str, tuple[str, int, bool]],
    float_model: Callable[..., Path],
) -> None:
    groups = StreamedModel(float_model(family, **changes)).groups[-1].values()
    assert {group.role: group.norm_offset for group in groups if group.norm} == norms
    found = {group.role: group.source for group in groups if group.source}
    assert {r: (s.linear.rpartition(".")[2], s.start, s.mixes) for r, s in found.items()} == sources
    assert all(bool(group.note) == (group.norm is None and group.source is None) for group in groups)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "gpt2",
            {"n_inner": 160, "bos_token_id": 0, "eos_token_id": 2},
            "the decoder blocks of this gpt2 model have no torch.nn.Linear",
        ),
        (
            "gpt_neox",
            {"tie_word_embeddings": True},
            r"linear layers of this gpt_neox model \(attention.query_key_value.*\) have none of the names",
        ),
    ],
)
def test_other_structures_are_refused(
    family: str, changes: dict[str, int], message: str, float_model: Callable[..., Path]
) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        StreamedModel(float_model(family, **changes))
    assert "docs/reference/families.md lists the models that can be quantized" in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma", {}), ("gemma2", {}), ("olmo2", {}), ("cohere", PARALLEL), ("qwen3_moe", EXPERTS)],
)
def test_a_rotation_is_refused_where_a_block_does_not_commute_with_it(
    family: str, changes: dict[str, Any], float_model: Callable[..., Path]
) -> None:
    with pytest.raises(CalibrationError, match="computes something else if its input is rotated"):
        RotatedModel(float_model(family, **changes))


@pytest.mark.parametrize("zero", ["input_layernorm", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"])
def test_structure_does_not_depend_on_weights(zero: str, float_model: Callable[..., Path], tmp_path: Path) -> None:
    """Zeros in the first block hide what depends on what: then o seemed to be linear in q."""
    directory = Path(shutil.copytree(float_model("llama"), tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    tensors[f"model.layers.0.{zero}.weight"].zero_()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert StreamedModel(directory).groups == StreamedModel(float_model("llama")).groups
