# SPDX-License-Identifier: Apache-2.0
"""The estimate: what it says of a large model, and whether it is right for a small one."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_w4a4_plugin.calibration.recipe import RECIPES, load_recipe
from vllm_w4a4_plugin.calibration.run.budget import Workload, estimate
from vllm_w4a4_plugin.checkpoint import TensorInfo

QWEN3_32B = SimpleNamespace(
    hidden_size=5120,
    intermediate_size=25600,
    num_hidden_layers=64,
    head_dim=128,
    num_attention_heads=64,
    num_key_value_heads=8,
)
OUTER = {
    name: TensorInfo(name, "model-00001.safetensors", "BF16", (151936, 5120))
    for name in ("model.embed_tokens.weight", "lm_head.weight")
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_32b_model_fits_into_32_gb(recipe: str) -> None:
    need = estimate(QWEN3_32B, OUTER, load_recipe(recipe), Workload(16384))
    assert 10e9 < need.memory < 32e9
    # 64 blocks: 0.49 GB of int4-in-int8 and int8 codes, or 0.62 GB with down_proj in bf16; kept twice while writing.
    assert 2 * 31e9 < need.disk < 2 * 50e9
    assert need.seconds > 3600


def test_experts_count() -> None:
    """Qwen3-30B-A3B: 48 blocks of 128 experts of 3 x 768 x 2048, 604 million parameters of experts in each."""
    config = SimpleNamespace(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts_per_tok=8,
        num_hidden_layers=48, head_dim=128, num_attention_heads=32, num_key_value_heads=4,
    )  # fmt: skip
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight": TensorInfo("", "file", "BF16", shape)
        for layer in range(48)
        for expert in range(128)
        for leaf, shape in {"gate_proj": (768, 2048), "up_proj": (768, 2048), "down_proj": (2048, 768)}.items()
    }
    need = estimate(config, tensors, load_recipe("tutorial"), Workload(16384))
    kept = estimate(config, tensors, load_recipe("tutorial", ["*.experts.*"]), Workload(16384))
    assert 4 * 604e6 < need.memory < 10e9  # a block in float32, and its codes
    assert 2 * 29e9 < need.disk < 2 * 35e9
    assert need.seconds > 3600
    assert kept.memory <= need.memory


def test_disk_instead_of_memory() -> None:
    memory, disk = (
        estimate(QWEN3_32B, OUTER, load_recipe("tutorial"), Workload(65536, activations_on_disk=on_disk))
        for on_disk in (False, True)
    )
    assert memory.memory - disk.memory == pytest.approx(disk.disk - memory.disk)
    assert disk.memory < memory.memory - 20e9


def test_distillation_needs_the_whole_model() -> None:
    need = estimate(QWEN3_32B, OUTER, load_recipe("tutorial"), Workload(8192, distill=8192))
    assert need.memory > 64 * 487e6 * 4


def test_self_generated_text_needs_the_whole_model() -> None:
    without, with_text = (
        estimate(QWEN3_32B, OUTER, load_recipe("tutorial"), Workload(16384, generated=tokens)) for tokens in (0, 16384)
    )
    assert without.memory < 32e9 < 4 * 32.7e9 < with_text.memory < 150e9
    assert with_text.seconds > without.seconds


@pytest.mark.parametrize("tokens", [1024, 8192])
def test_memory_grows_with_tokens(tokens: int) -> None:
    small, large = (
        estimate(QWEN3_32B, OUTER, load_recipe("tutorial"), Workload(t)).memory for t in (tokens, 2 * tokens)
    )
    assert large > small


def test_the_estimate_is_right(float_model: Callable[..., Path], tmp_path: Path) -> None:
    """Peak resident memory of a real process, on a block wide enough to matter compared with Python and torch."""
    directory = float_model("llama", num_hidden_layers=1, hidden_size=768, intermediate_size=2048, head_dim=192)
    text = tmp_path / "text.json"
    text.write_text(json.dumps(["The quick brown fox jumps over the lazy dog. " * 2000]))
    # Not `ru_maxrss`: a process inherits that from the one that started it, this one, which may have served models.
    script = (
        "import sys; from vllm_w4a4_plugin.cli import main; status = main(sys.argv[1:]); "
        "print(open('/proc/self/status').read()); sys.exit(status)"
    )
    command = [sys.executable, "-c", script, "quantize", str(directory), "--output", str(tmp_path / "out")]
    process = subprocess.run(
        [*command, "--calib-file", str(text), "--calib-tokens", "2048", "--recipe", "all-w4a4", "--distill", "0"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    claimed = float(re.search(r"needs about ([\d.]+) GB of memory", process.stderr)[1])  # type: ignore[index]
    used = float(re.search(r"VmHWM:\s+(\d+) kB", process.stdout)[1]) * 1024 / 1e9  # type: ignore[index]
    assert 0.7 * used < claimed < 1.5 * used
