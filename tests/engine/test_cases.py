# SPDX-License-Identifier: Apache-2.0
"""Every case of tests/data/cases: `verify` and loading agree, and what loads has the numbers of the torch model."""

from pathlib import Path

import pytest
import torch

from tests.cases import NAMES, write_case
from tests.engine.engines import engine
from tests.engine.oracle import engine_logprobs, prompt_logprobs
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings

REFUSED = {
    "g2_quarot_heads": "heads_rotation: a rotation of the attention heads that QuaRot computes online",
    "k3_stale_shard": "quant_model_weight_w4a4_flatquant_dynamic-00002-of-00002.safetensors is not named by",
}
WITHOUT_NUMBERS = {"c1_moe_w4", "e1_static"}
"""Cases that come without expected numbers, which are then those of the oracle of the other engine tests."""
IDS = list(range(3, 500, 17))
A_ROUNDING_FLIPS = {"c1_moe_w4", "c4_moe_mixed", "f4_group3d"}
"""Cases in which the roundings of a few activations fall the other way: found by their small, scattered differences."""


def findings(directory: Path) -> list[str]:
    reader = CheckpointReader(directory)
    return list(header_findings(reader)) or list(value_findings(reader))


def log_probabilities(directory: Path, ids: list[int]) -> torch.Tensor:
    options = {"quantization": "ascend", "skip_tokenizer_init": True, "gpu_memory_utilization": 0.1}
    with engine(directory, in_this_process=True, **options) as llm:
        return engine_logprobs(llm, ids)


def test_all_cases_are_there() -> None:
    assert len(NAMES) == 17


@pytest.mark.engine
@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_what_verify_calls_good_has_the_right_numbers(name: str, tmp_path: Path) -> None:
    expected = write_case(name, tmp_path)
    if name in WITHOUT_NUMBERS:
        expected = {"ids": IDS, "lp": prompt_logprobs(tmp_path, IDS).tolist()}
    assert expected is not None
    assert findings(tmp_path) == []
    difference = (log_probabilities(tmp_path, expected["ids"]) - torch.tensor(expected["lp"])).abs()
    if name in A_ROUNDING_FLIPS:
        assert difference.median() < 1e-2
    else:
        assert difference.max() < 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_by_both(name: str, tmp_path: Path) -> None:
    write_case(name, tmp_path)
    assert any(REFUSED[name] in finding for finding in findings(tmp_path))
    with pytest.raises(CheckpointError, match=REFUSED[name].replace("(", r"\(")):
        log_probabilities(tmp_path, [1, 2])
