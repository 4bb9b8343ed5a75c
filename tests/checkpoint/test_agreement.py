# SPDX-License-Identifier: Apache-2.0
"""What must be the same in all parts of a layer that is computed as one."""

import re
from dataclasses import replace
from typing import Any

import pytest

from vllm_w4a4_plugin.checkpoint import CheckpointError, QuantType, TensorInfo
from vllm_w4a4_plugin.checkpoint.agreement import agreeing_spec, merge_clip_ratios
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec

FIRST = LinearSpec("q", QuantType.W4A4_FLATQUANT_DYNAMIC, 64, 144, left=12, right=12)
TENSORS = {
    name: TensorInfo(name, file, "F32", (12, 12))
    for name, file in (("q.left_trans", "one.safetensors"), ("k.left_trans", "two.safetensors"))
}


def test_parts_that_agree() -> None:
    assert agreeing_spec("qkv", [FIRST, replace(FIRST, name="k", output_size=32)], {}) is FIRST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"left": 9, "right": 16},
            "two.safetensors: layer qkv is computed as one, so the size of left_trans of its parts must be equal: "
            "expected 12 as in q, found 9 in k. Quantize them again as one group.",
        ),
        (
            {"groups": 3},
            "layer qkv is computed as one, so the number of weight scale groups of its parts must be equal: expected 1 "
            "as in q, found 3 in k. Quantize them again as one group.",
        ),
        (
            {"left": None},
            "two.safetensors: layer qkv is computed as one, so the size of left_trans of its parts must be equal: "
            "expected 12 as in q, found None in k. Quantize them again as one group.",
        ),
    ],
)
def test_parts_that_differ(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        agreeing_spec("qkv", [FIRST, replace(FIRST, name="k", **change)], TENSORS)


def test_clip_ratios() -> None:
    clips = {"q": 0.97991, "k": 0.97990, "v": 0.97990}
    assert merge_clip_ratios("qkv", clips, {}) == pytest.approx(0.979903, abs=1e-6)
    with pytest.raises(CheckpointError, match=r"^one, two: layer qkv: clip ratios .*q: 0\.9.*k: 0\.91"):
        merge_clip_ratios("qkv", {"q": 0.9, "k": 0.91}, {"q": "two", "k": "one"})
