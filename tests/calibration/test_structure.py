# SPDX-License-Identifier: Apache-2.0
"""Structure tracing on real transformers blocks: what is found, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm_w4a4_plugin.calibration.structure import Group, Role

from tests.calibration.conftest import FAMILIES
from vllm_w4a4_plugin.calibration.errors import CalibrationError
from vllm_w4a4_plugin.calibration.model import StreamedModel


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
        ("phi3", {"pad_token_id": 0}, "found linear layers self_attn.qkv_proj"),
        ("gemma", {}, "RMSNorm"),
        ("mixtral", {"num_local_experts": 2}, "mixture of experts"),
        ("gpt2", {"n_inner": 160, "bos_token_id": 0, "eos_token_id": 2}, "found linear layers none"),
    ],
)
def test_other_structures_are_refused(
    family: str, changes: dict[str, int], message: str, float_model: Callable[..., Path]
) -> None:
    with pytest.raises(CalibrationError, match=message):
        StreamedModel(float_model(family, **changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_model_computes_what_transformers_does(family: str, float_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    directory = float_model(family)
    ids = torch.randint(3, 512, (2, 48), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
    model = StreamedModel(directory)
    hidden, _ = model.start(ids)
    with torch.no_grad():
        for index in range(len(model)):
            hidden = model.run_block(model.load_block(index), index, hidden)
        assert torch.allclose(model.logits(hidden), expected, atol=1e-4)


def test_directories_without_a_usable_model_are_refused(tmp_path: Path, float_model: Callable[..., Path]) -> None:
    with pytest.raises(CalibrationError, match=r"no config\.json"):
        StreamedModel(tmp_path)
    (tmp_path / "config.json").write_text((float_model("llama") / "config.json").read_text())
    with pytest.raises(CalibrationError, match=r"no \*\.safetensors"):
        StreamedModel(tmp_path)
