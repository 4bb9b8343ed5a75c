# SPDX-License-Identifier: Apache-2.0
"""Which quantization method a checkpoint gets that has a description, whatever else its config.json says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.loading import engine_config
from vllm_w4a4_plugin.constants import LOAD_FORMAT, METHOD

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@pytest.mark.feature("`--load-format auto`, `hf`, `safetensors`")
@pytest.mark.parametrize("load_format", ["auto", "hf", "safetensors"])
@pytest.mark.parametrize("quantization", [METHOD, None])
@pytest.mark.parametrize("leftover", [{}, {"quantization_config": FP8}])
def test_the_description_decides(
    micro_copy: Path,
    edit_json: Callable[..., None],
    leftover: dict[str, Any],
    quantization: str | None,
    load_format: str,
) -> None:
    """Left in config.json by the float model, `quantization_config` would load int4 values as fp8."""
    edit_json("config.json", leftover)
    config = engine_config(micro_copy, quantization=quantization, load_format=load_format)
    assert config.model_config.quantization == METHOD
    assert config.load_config.load_format == LOAD_FORMAT
