# SPDX-License-Identifier: Apache-2.0
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MICRO, WEIGHTS
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.checkpoint import reader as reader_module
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings

Q = "model.layers.0.self_attn.q_proj"


def findings(directory: Path) -> list[str]:
    reader = CheckpointReader(directory)
    return list(header_findings(reader)) or list(value_findings(reader))


def test_the_real_checkpoint_is_good() -> None:
    assert findings(MICRO) == []


def test_every_value_finding_is_reported(micro_copy: Path, edit_tensors: Callable[..., None]) -> None:
    reader = CheckpointReader(micro_copy)
    weight = reader.load(f"{Q}.weight").clone()
    weight[3, 5] = 9
    clip = torch.tensor([1.25])
    right = reader.load(f"{Q}.right_trans") + 1
    edit_tensors({f"{Q}.weight": weight, f"{Q}.clip_ratio": clip, f"{Q}.right_trans": right})
    found = findings(micro_copy)
    assert len(found) == 5
    assert any(f"{Q}.weight: expected int4" in text for text in found)
    assert any(f"{Q}.clip_ratio: expected a clip ratio in (0, 1], found 1.25" in text for text in found)
    assert sum(f"right_trans: expected the same values as in {Q}.right_trans" in text for text in found) == 2


def test_description_and_weights_must_name_the_same_tensors(
    micro_copy: Path, edit_json: Callable[..., None], edit_tensors: Callable[..., None]
) -> None:
    edit_json("quant_model_description.json", remove=(f"{Q}.weight_scale",))
    edit_tensors(remove=("model.layers.0.input_layernorm.weight",))
    found = findings(micro_copy)
    assert any(f"{Q}.weight_scale has no entry" in text for text in found)
    assert any("input_layernorm.weight is described as FLOAT but is in none" in text for text in found)


def test_a_file_is_opened_once_for_all_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of mixtures have tens of thousands of tensors, whose headers are parsed each time."""
    opened: list[Path] = []
    original = reader_module.safe_open

    def counting(file: Path, framework: str) -> Any:
        opened.append(file)
        return original(file, framework=framework)

    reader = CheckpointReader(MICRO)
    assert list(header_findings(reader)) == []
    monkeypatch.setattr(reader_module, "safe_open", counting)
    assert list(value_findings(reader)) == []
    assert opened == [MICRO / WEIGHTS]


def test_values_need_torch_and_headers_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    reader = CheckpointReader(MICRO)
    assert list(header_findings(reader)) == []
    with pytest.raises(CheckpointError, match=r"needs torch, which .* cannot import\. Install vLLM or torch there\."):
        list(value_findings(reader))
