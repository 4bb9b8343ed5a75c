# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MICRO
from vllm_w4a4_plugin.capacity.model import read_model
from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.device_check.plan import (
    LayerOnRank,
    Phase,
    Step,
    default_layers,
    layers_on_rank,
    make_plan,
)
from vllm_w4a4_plugin.ops.npu.select import Kernel, RankShape

FLATQUANT = QuantType.W4A4_FLATQUANT_DYNAMIC


def sizes(layers: list[LayerOnRank]) -> list[tuple[Any, ...]]:
    return [(layer.names, layer.shape.output_size, layer.shape.input_size, layer.whole_input) for layer in layers]


def test_shards_are_fused_and_each_kind_is_checked_once() -> None:
    assert sizes(layers_on_rank(read_model(MICRO), 1)) == [("qkv_proj", 512, 192, 192), ("gate_up_proj", 768, 192, 192)]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (
            1,
            [
                ("qkv_proj", 10240, 5120, 5120),
                ("o_proj", 5120, 8192, 8192),
                ("gate_up_proj", 51200, 5120, 5120),
                ("down_proj", 5120, 25600, 25600),
            ],
        ),
        (
            4,
            [
                ("qkv_proj", 2560, 5120, 5120),
                ("o_proj", 5120, 2048, 8192),
                ("gate_up_proj", 12800, 5120, 5120),
                ("down_proj", 5120, 6400, 25600),
            ],
        ),
    ],
)
def test_sizes_on_a_device(config_only: Callable[..., Path], ranks: int, expected: list[Any]) -> None:
    assert sizes(layers_on_rank(read_model(config_only(), "all-w4a4"), ranks)) == expected


def test_the_default_is_qwen3_32b(config_only: Callable[..., Path]) -> None:
    assert default_layers() == layers_on_rank(read_model(config_only(), "all-w4a4"), 1)


def test_the_simplest_comes_first() -> None:
    steps = make_plan(default_layers(), True)
    order = list(dict.fromkeys(step.phase for step in steps))
    assert order[:3] == [Phase.ENVIRONMENT, Phase.CANN, Phase.FUSED]
    fused = [step.kind for step in steps if step.phase is Phase.FUSED]
    assert list(dict.fromkeys(fused)) == ["library", "phases", "linear", "layout", "nonfinite", "graph"]
    assert {step.kernel for step in steps if step.phase is Phase.CANN} == {"", Kernel.KRONECKER, Kernel.UNFUSED}


def test_without_the_library_nothing_needs_it() -> None:
    assert all(step.kernel != Kernel.FUSED for step in make_plan(default_layers(), False))


def test_a_row_parallel_layer_quantizes_whole_tokens_and_multiplies_its_part() -> None:
    shape = RankShape(FLATQUANT, 5120, 6400, 1, 160, 160, is_row_parallel=True)
    steps = make_plan([LayerOnRank("down_proj", shape, 25600, False)], True)
    layer = [step for step in steps if "down_proj" in step.title]
    assert {step.kernel for step in layer} == {Kernel.KRONECKER}  # the fused kernel cannot divide tokens
    assert {(step.arguments["sizes"], step.arguments["whole_input"]) for step in layer} == {((5120, 6400), 25600)}


def test_a_layer_without_a_kernel_is_a_step_of_its_own() -> None:
    shape = RankShape(QuantType.W4A4_DYNAMIC, 64, 192, groups=6)
    (step,) = [s for s in make_plan([LayerOnRank("up_proj", shape, 192, False)], False) if "up_proj" in s.title]
    assert step.kind == "refused"
    assert "6 scale groups per row" in step.arguments["reason"]


def test_steps_survive_json() -> None:
    for step in make_plan(default_layers(), True):
        again = Step(**json.loads(json.dumps(step.as_json())))
        assert (again.kind, again.phase, again.kernel, again.limit) == (step.kind, step.phase, step.kernel, step.limit)


def test_planning_needs_no_torch() -> None:
    package = "vllm_w4a4_plugin.device_check"
    code = f"import sys, {package}.plan, {package}.report; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "False", result.stderr
