# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens."""

import pytest
from transformers import AutoTokenizer

from tests.conftest import MICRO
from vllm_w4a4_plugin.calibration.data.tokens import token_rows
from vllm_w4a4_plugin.calibration.errors import CalibrationError


def test_token_rows_waste_almost_nothing_and_respect_the_limit() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    text = "The quick brown fox jumps over the lazy dog. " * 80
    total = len(tokenizer(text, add_special_tokens=False).input_ids)
    rows = token_rows([text], tokenizer, 300, 10**6, "t")
    assert rows.shape[1] <= 300
    assert total - rows.numel() < len(rows)
    assert token_rows([text], tokenizer, 300, 700, "t").numel() <= 700
    with pytest.raises(CalibrationError, match="too few"):
        token_rows(["short"], tokenizer, 300, 700, "t")
