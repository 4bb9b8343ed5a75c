# SPDX-License-Identifier: Apache-2.0
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "model_type": "qwen3",
    "num_attention_heads": 64,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "quantize": "w4a4_flatquant_dynamic",
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


@pytest.fixture
def config_only(tmp_path: Path) -> Callable[..., Path]:
    """A directory that holds the config.json of Qwen3-32B, with changes, and nothing else."""

    def make(**changes: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**QWEN3_32B, **changes}))
        return tmp_path

    return make
