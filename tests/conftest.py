# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: the checkpoint that the real tool made, and edited copies of it."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

# Nothing here may ask a hub: the tests' models are all on disk.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

DATA = Path(__file__).parent / "data"
MICRO = DATA / "micro-qwen3-w4a4"
GOLDEN = DATA / "micro-qwen3-golden.safetensors"
WEIGHTS = "quant_model_weight_w4a4_flatquant_dynamic-00001-of-00001.safetensors"
INDEX = "quant_model_weight_w4a4_flatquant_dynamic.safetensors.index.json"
DESCRIPTION = "quant_model_description.json"


@pytest.fixture
def micro_copy(tmp_path: Path) -> Path:
    """A copy of the micro checkpoint that a test may edit."""
    return Path(shutil.copytree(MICRO, tmp_path / "micro"))


@pytest.fixture
def edit_json(micro_copy: Path) -> Callable[..., None]:
    """Merge entries into a JSON file of the copy; the value None under `remove` deletes keys."""

    def edit(name: str, entries: Mapping[str, Any] | None = None, remove: tuple[str, ...] = ()) -> None:
        file = micro_copy / name
        data = {**json.loads(file.read_text()), **(entries or {})}
        file.write_text(json.dumps({key: value for key, value in data.items() if key not in remove}))

    return edit


@pytest.fixture
def edit_tensors(micro_copy: Path) -> Callable[..., None]:
    """Replace or remove tensors of the copy, in its weights and its index."""

    def edit(entries: Mapping[str, Any] | None = None, remove: tuple[str, ...] = ()) -> None:
        from safetensors.torch import load_file, save_file

        file = micro_copy / WEIGHTS
        tensors = {**load_file(file), **(entries or {})}
        save_file({name: t for name, t in tensors.items() if name not in remove}, file, metadata={"format": "pt"})
        index = json.loads((micro_copy / INDEX).read_text())
        index["weight_map"] = {name: WEIGHTS for name in tensors if name not in remove}
        (micro_copy / INDEX).write_text(json.dumps(index))

    return edit
