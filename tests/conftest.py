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
# Two files of tests run at a time, so that an engine should not have every core.
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")
# The oracles have heads in float; tests of the int8 head ask for it.
os.environ.setdefault("VLLM_W4A4_HEAD", "float")

DATA = Path(__file__).parent / "data"
MICRO = DATA / "micro-qwen3-w4a4"
GOLDEN = DATA / "micro-qwen3-golden.safetensors"
WEIGHTS = "quant_model_weight_w4a4_flatquant_dynamic-00001-of-00001.safetensors"
INDEX = "quant_model_weight_w4a4_flatquant_dynamic.safetensors.index.json"
DESCRIPTION = "quant_model_description.json"
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
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


@pytest.fixture
def config_only(tmp_path: Path) -> Callable[..., Path]:
    """A directory that holds the config.json of Qwen3-32B, with changes, and nothing else."""

    def make(**changes: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**QWEN3_32B, **changes}))
        return tmp_path

    return make


def swapped_layers() -> dict[str, Any]:
    """The tensors of the micro checkpoint's two decoder layers, each under its counterpart's name."""
    from vllm_w4a4_plugin.checkpoint import CheckpointReader

    reader, prefix = CheckpointReader(MICRO), "model.layers."
    numbers = {f"{prefix}0.": f"{prefix}1.", f"{prefix}1.": f"{prefix}0."}
    return {
        name.replace(first, second, 1): reader.load(name)
        for name in reader.tensors
        for first, second in numbers.items()
        if name.startswith(first)
    }
