# SPDX-License-Identifier: Apache-2.0
"""Experts of models whose architecture is not in the table; for the table see tests/engine/test_agreement.py."""

from pathlib import Path

import pytest

from tests.fuzz.answers import findings, unchecked
from tests.fuzz.draft import Draft, base


@pytest.fixture
def other_mixture() -> Draft:
    """A mixture of experts of an architecture that is not in the table."""
    draft = base("c4_moe_mixed")
    draft.config = {**draft.config, "architectures": ["OtherMoeForCausalLM"], "model_type": "other"}  # type: ignore[dict-item]
    return draft


def test_whole_experts_are_good_and_the_rest_is_said_to_be_unchecked(other_mixture: Draft, tmp_path: Path) -> None:
    other_mixture.write(tmp_path)
    assert findings(tmp_path) == []
    assert "(OtherMoeForCausalLM) are not known here" in unchecked(tmp_path)[0]


@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_projection_of_an_expert_is_missing(other_mixture: Draft, tmp_path: Path, number: int) -> None:
    other_mixture.drop(f"model.layers.1.mlp.experts.{number}.up_proj.weight")
    other_mixture.write(tmp_path)
    assert f"layer model.layers.1.mlp.experts: expert {number} has no up_proj" in findings(tmp_path)[0]


def test_the_last_expert_is_missing(other_mixture: Draft, tmp_path: Path) -> None:
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        other_mixture.drop(f"model.layers.1.mlp.experts.3.{leaf}.weight")
    other_mixture.write(tmp_path)
    assert "expert 3 has no down_proj, gate_proj, up_proj" in findings(tmp_path)[0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [4, 10**9, 10**17])
@pytest.mark.parametrize("case", ["c4_moe_mixed", "other"])
def test_one_expert_has_a_high_number(other_mixture: Draft, tmp_path: Path, case: str, number: int) -> None:
    """It does not stand for all the experts below it, of which names would be made."""
    draft = other_mixture if case == "other" else base(case)
    for name in [name for name in draft.names() if ".experts.3." in name]:
        tensor, kind = draft.get(name), draft.type_of(name)
        draft.drop(name)
        draft.put(name.replace(".experts.3.", f".experts.{number}."), tensor, kind)
    draft.write(tmp_path)
    assert any("experts.3" in finding or "expert 3 " in finding for finding in findings(tmp_path))
