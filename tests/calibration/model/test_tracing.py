# SPDX-License-Identifier: Apache-2.0
"""Structure tracing on real transformers blocks: what is found, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.calibration.conftest import FAMILIES
from vllm_w4a4_plugin.calibration.errors import CalibrationError
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.calibration.model.structure import Group, Role


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, float_model: Callable[..., Path]) -> None:
    groups, second = StreamedModel(float_model(family)).groups
    assert second == groups
    attention, mlp = "self_attn.", "mlp."
    assert groups[Role.QKV] == Group(
        Role.QKV, (attention + "q_proj", attention + "k_proj", attention + "v_proj"), "input_layernorm"
    )
    # A bias of v is part of what o receives, so v is its source with or without one.
    assert groups[Role.O] == Group(Role.O, (attention + "o_proj",), None, attention + "v_proj")
    assert groups[Role.GATE_UP] == Group(Role.GATE_UP, (mlp + "gate_proj", mlp + "up_proj"), "post_attention_layernorm")
    assert groups[Role.DOWN] == Group(Role.DOWN, (mlp + "down_proj",), None, mlp + "up_proj")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("phi3", {"pad_token_id": 0}, "of this phi3 model: q, k and v are one matrix .*gate and up are one matrix"),
        ("glm4", {"pad_token_id": 0}, r"of this glm4 model: gate and up are one matrix \(mlp.gate_up_proj\)"),
        ("starcoder2", {}, r"of this starcoder2 model: the MLP has no gate \(mlp.c_fc\)"),
        ("cohere", {"pad_token_id": 0}, "of this cohere model: attention and MLP have one input"),
        ("gemma", {}, "of this gemma model: .* but GemmaRMSNorm multiplies by something else, such as 1 [+] weight"),
        ("gemma3_text", {}, "of this gemma3_text model: .* but Gemma3RMSNorm multiplies by something else"),
        ("olmo", {}, "of this olmo model: .* but OlmoLayerNorm has no weight"),
        ("olmo2", {}, "of this olmo2 model: .* but no norm is there"),
        ("stablelm", {}, "of this stablelm model: .* but LayerNorm has a bias"),
        ("mixtral", {"num_local_experts": 2}, r"this mixtral model is a mixture of experts \(num_experts = 2\)"),
        ("qwen3_moe", {"num_experts": 4}, r"this qwen3_moe model is a mixture of experts \(num_experts = 4\)"),
        ("olmoe", {"num_experts": 4}, r"this olmoe model is a mixture of experts \(num_experts = 4\)"),
        (
            "gpt2",
            {"n_inner": 160, "bos_token_id": 0, "eos_token_id": 2},
            "of this gpt2 model: it has no torch.nn.Linear",
        ),
    ],
)
def test_other_structures_are_refused(
    family: str, changes: dict[str, int], message: str, float_model: Callable[..., Path]
) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        StreamedModel(float_model(family, **changes))
    assert "Only dense language models of the Llama, Qwen2, Qwen3 and Mistral families" in str(error.value)


@pytest.mark.parametrize("zero", ["input_layernorm", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"])
def test_structure_does_not_depend_on_weights(zero: str, float_model: Callable[..., Path], tmp_path: Path) -> None:
    """Zeros in the first block hide what depends on what: then o seemed to be linear in q."""
    directory = Path(shutil.copytree(float_model("llama"), tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    tensors[f"model.layers.0.{zero}.weight"].zero_()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert StreamedModel(directory).groups == StreamedModel(float_model("llama")).groups
