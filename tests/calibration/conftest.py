# SPDX-License-Identifier: Apache-2.0
"""Tiny random float models of the supported families, with the micro checkpoint's tokenizer."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MICRO

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": None},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring on matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make (once) the directory of a model of a family; more keywords change its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = f"{family}-{sorted(changes.items())}"
        if key not in made:
            directory = tmp_path_factory.mktemp(family)
            torch.manual_seed(1)
            config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES.get(family, {}), **changes})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim == 1:  # norms are all ones and biases all zeros otherwise
                        parameter.copy_((torch.rand_like(parameter) + 0.5) * (0.2 if "bias" in name else 1))
            model.save_pretrained(directory)
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
                shutil.copy(MICRO / name, directory / name)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Token ids [12, 64]: enough tokens that no moment matrix of the tiny models is singular."""
    return torch.randint(3, 512, (12, 64), generator=torch.Generator().manual_seed(5))
