# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with an int8 output head: vllm-ascend's own method computes the logits with it."""

from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config

from tests.heads import int8_head, logits_by_formula, put_head
from tests.linears import relative_error
from tests.npu.loading import loaded_model


def test_the_logits_are_those_of_the_stored_head(micro_copy: Path, calls: list[tuple[str, Any]]) -> None:
    head = int8_head()
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    with loaded_model(put_head(micro_copy, head)) as model:
        method = model.lm_head.quant_method
        assert type(method).__name__ == "AscendEmbeddingMethod"
        assert type(method.quant_method).__name__ == "AscendW8A8DynamicLinearMethod"
        calls.clear()
        found = model.compute_logits(x)
        assert [name for name, _ in calls] == ["npu_dynamic_quant", "npu_quant_matmul"]
        table = get_current_vllm_config().quant_config.report.table()
    # vllm-ascend keeps the scales in the model's dtype.
    scale = head["lm_head.weight_scale"].bfloat16()
    expected = logits_by_formula(x, head["lm_head.weight"], scale).bfloat16()
    assert relative_error(found, expected) < 2**-8
    (row,) = (line for line in table.splitlines() if "lm_head" in line)
    assert row.split()[:4] == ["W8A8_DYNAMIC", "1", "0.1", "MiB"]
