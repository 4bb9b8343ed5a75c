# SPDX-License-Identifier: Apache-2.0
"""Structure tracing on real transformers blocks: what is found, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

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
