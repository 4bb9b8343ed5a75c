# SPDX-License-Identifier: Apache-2.0
"""Types and tensors that are known and not run: refused by name, by `verify` and by loading with the same words."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import DESCRIPTION
from tests.loading import engine_config
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.checkpoint.verify import header_findings

O_PROJ, K_PROJ = "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.k_proj"
SUFFIXES = ("weight", "weight_scale", "weight_offset")
NPUS = "vllm-ascend runs it on NPUs"


def refused(directory: Path, *words: str) -> None:
    findings = list(header_findings(CheckpointReader(directory)))
    assert any(all(word in finding for word in words) for finding in findings), findings
    with pytest.raises(CheckpointError, match=re.escape(findings[0])):
        engine_config(directory)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("W8A8_MIX", NPUS),
        ("W8A8_MXFP8", NPUS),
        ("W4A8_MXFP", NPUS),
        ("W4A4_MXFP4", NPUS),
        ("W4A4_MXFP4_FLATQUANT", NPUS),
        ("W4A4_MXFP4_DUALSCALE", "Types that can: FLOAT"),
        ("W8A8FP8_DYNAMIC", NPUS),
        ("W4A8_SVD_DYNAMIC", "Types that can: FLOAT"),
        ("W8A8_SVD", "Types that can: FLOAT"),
    ],
)
def test_types(micro_copy: Path, edit_json: Callable[..., None], name: str, remedy: str) -> None:
    edit_json(DESCRIPTION, {f"{O_PROJ}.{suffix}": name for suffix in SUFFIXES})
    refused(micro_copy, f"layer {O_PROJ}: quant type {name} cannot be run here", remedy)


def test_a_type_from_the_future(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    edit_json(DESCRIPTION, {f"{O_PROJ}.{suffix}": "W3A3_DYNAMIC" for suffix in SUFFIXES})
    refused(micro_copy, f"tensor '{O_PROJ}.weight' has the unknown quant type 'W3A3_DYNAMIC'", "W8A16")


@pytest.mark.parametrize("key", ["kv_quant_type", "kv_cache_type", "fa_quant_type"])
def test_headlines_of_quantized_caches(micro_copy: Path, edit_json: Callable[..., None], key: str) -> None:
    edit_json(DESCRIPTION, {key: "C8"})
    refused(micro_copy, f"{key} is 'C8'", "cannot be run on CPU", NPUS)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (f"{K_PROJ}.kv_cache_scale", "C8"),
        (f"{K_PROJ}.kv_cache_offset", "C8"),
        ("model.layers.0.self_attn.fa_k.scale", "FAQuant"),
        ("model.layers.0.self_attn.fa_k.offset", "FAKQuant"),
    ],
)
def test_tensors_of_quantized_caches(
    micro_copy: Path, edit_json: Callable[..., None], edit_tensors: Callable[..., None], tensor: str, kind: str
) -> None:
    edit_json(DESCRIPTION, {tensor: kind})
    edit_tensors({tensor: torch.ones(1)})
    refused(micro_copy, f"tensor {tensor} has quant type {kind}", "quantized KV cache or attention", NPUS)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (f"{O_PROJ}.heads_rotation", "a rotation of the attention heads"),
        (f"{O_PROJ}.kronecker_rotation_m", "one factor of an online rotation"),
        (f"{O_PROJ}.svd_lowrank_l1", "one factor of a low-rank correction (SVD)"),
        (f"{O_PROJ}.div.mul_scale", "smooth quantization"),
    ],
)
def test_tensors_that_change_the_arithmetic(
    micro_copy: Path, edit_json: Callable[..., None], edit_tensors: Callable[..., None], tensor: str, words: str
) -> None:
    edit_json(DESCRIPTION, {tensor: "FLOAT"})
    edit_tensors({tensor: torch.eye(4)})
    refused(micro_copy, f"tensor {tensor}", words, "quantize the model without it")


def test_a_rotation_that_only_the_metadata_name(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    metadata: dict[str, Any] = {"quarot": {"heads_rotation": {"layers": [f"{O_PROJ}."]}}}
    edit_json(DESCRIPTION, {"metadata": metadata})
    assert json.loads((micro_copy / DESCRIPTION).read_text())["metadata"] == metadata
    refused(micro_copy, "the metadata of QuaRot name heads_rotation", "quantize without it")
