# SPDX-License-Identifier: Apache-2.0
"""Faults of experts, routers and vision parts: `verify`, loading and `doctor` give the same answer, in one line."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import DESCRIPTION
from tests.engine.test_cases import findings
from tests.loading import loaded_model
from tests.mixtures import EXPERTS, HIDDEN, KINDS, write, write_mixture
from tests.vision import MODELS, write_model
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.cli import main

LAYER = f"model.layers.{KINDS.index('W4A4_FLATQUANT_DYNAMIC')}.mlp"
FILE = "quant_model_weights-00001-of-00001.safetensors"
Tensors, Types = dict[str, torch.Tensor], dict[str, str]
Change = Callable[[Tensors, Types], None]


def no_expert(tensors: Tensors, types: Types) -> None:
    for name in [name for name in tensors if f"{LAYER}.experts.3." in name]:
        del tensors[name], types[name]


def no_last_expert(tensors: Tensors, types: Types) -> None:
    for name in [name for name in tensors if f"{LAYER}.experts.{EXPERTS - 1}." in name]:
        del tensors[name], types[name]


def no_projection(tensors: Tensors, types: Types) -> None:
    for name in [name for name in tensors if f"{LAYER}.experts.3.up_proj." in name]:
        del tensors[name], types[name]


def other_type(tensors: Tensors, types: Types) -> None:
    for name in [name for name in tensors if f"{LAYER}.experts.3." in name]:
        if name.endswith(("trans", "clip_ratio")):
            del tensors[name], types[name]
        else:
            types[name] = "W4A4_DYNAMIC"


def other_transform(tensors: Tensors, types: Types) -> None:
    tensors[f"{LAYER}.experts.3.up_proj.left_trans"] *= 1.01


def other_clip(tensors: Tensors, types: Types) -> None:
    tensors[f"{LAYER}.experts.3.up_proj.clip_ratio"] *= 0.5


def other_factors(tensors: Tensors, types: Types) -> None:
    tensors[f"{LAYER}.experts.3.down_proj.left_trans"] = torch.eye(12)
    tensors[f"{LAYER}.experts.3.down_proj.right_trans"] = torch.eye(8)


def quantized_router(tensors: Tensors, types: Types) -> None:
    tensors[f"{LAYER}.gate.weight"] = torch.ones(EXPERTS, HIDDEN, dtype=torch.int8)
    tensors[f"{LAYER}.gate.weight_scale"] = torch.ones(EXPERTS, 1)
    tensors[f"{LAYER}.gate.weight_offset"] = torch.zeros(EXPERTS, 1)
    names = [f"{LAYER}.gate.{suffix}" for suffix in ("weight", "weight_scale", "weight_offset")]
    types.update(dict.fromkeys(names, "W4A4_DYNAMIC"))


GONE = "is in none of the weight files, but the model of config.json has it. The checkpoint is incomplete"
AGAIN = "as one group."
FAULTS: Mapping[Change, list[str]] = {
    no_expert: [f"tensor {LAYER}.experts.3.gate_proj.weight {GONE}"],
    no_last_expert: [f"tensor {LAYER}.experts.{EXPERTS - 1}.gate_proj.weight {GONE}"],
    no_projection: [f"tensor {LAYER}.experts.3.up_proj.weight {GONE}"],
    other_type: [
        f"{DESCRIPTION}: the experts of {LAYER}.experts run as one kernel, so they must have one quant type, found ",
        f"{LAYER}.experts.3.down_proj: W4A4_DYNAMIC. Quantize the model again with one type for all experts.",
    ],
    other_transform: [
        f"{FILE}: layer {LAYER}.experts, tensor {LAYER}.experts.3.up_proj.left_trans: expected the same values as in "
        f"{LAYER}.experts.0.gate_proj.left_trans ",
        "found others",
        "quantize it again.",
    ],
    other_clip: [
        f"{FILE}: layer {LAYER}.experts: clip ratios of layers ",
        f"differ by more than 0.001 relative, found {LAYER}.experts.3.up_proj.clip_ratio: 0.4",
        AGAIN,
    ],
    other_factors: [
        f"{FILE}: layer {LAYER}.experts is computed as one, so the size of left_trans of its parts must be equal: ",
        f"expected 8 as in {LAYER}.experts.0.down_proj, found 12 in {LAYER}.experts.3.down_proj. Quantize ",
        AGAIN,
    ],
    quantized_router: [
        f"{DESCRIPTION}: layer {LAYER}.gate: routers of experts of quant type W4A4_DYNAMIC cannot be run ",
        "Types that can: FLOAT",
        "Quantize the model again with one of them for this layer.",
    ],
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixture")
    write_mixture(directory)
    return directory


def three_answers(directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str, str]:
    """What `verify` finds first, what loading says, and what `doctor` finds first."""
    found = findings(directory)
    assert all("\n" not in finding for finding in found)
    with pytest.raises(CheckpointError) as error, loaded_model(directory):
        pass
    capsys.readouterr()
    assert main(["doctor", str(directory), "--json"]) == 1
    return found[0], str(error.value), json.loads(capsys.readouterr().out)["problems"][0]


@pytest.fixture
def spoiled(mixture: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """Writes the mixture after a change."""

    def spoil(change: Change) -> Path:
        reader = CheckpointReader(mixture)
        tensors, types = {name: reader.load(name) for name in reader.tensors}, dict(reader.description.tensors)
        change(tensors, types)
        write(tmp_path, tensors, types)
        (tmp_path / "config.json").write_text((mixture / "config.json").read_text())
        return tmp_path

    return spoil


@pytest.mark.parametrize("change", FAULTS, ids=lambda change: change.__name__)
def test_faults_of_a_mixture(
    change: Change, spoiled: Callable[[Change], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for answer in three_answers(spoiled(change), capsys):
        places = [answer.find(part) for part in FAULTS[change]]
        assert places == sorted(places), answer
        assert places[0] >= 0, answer


def refused_on_cpus(directory: Path, text: str) -> None:
    assert any(text in finding for finding in findings(directory))
    with pytest.raises(CheckpointError, match=re.escape(text)), loaded_model(directory):
        pass


def test_a_router_that_vllm_ascend_runs(spoiled: Callable[[Change], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """`doctor`, which answers for NPUs, has nothing against it."""

    def change(tensors: Tensors, types: Types) -> None:
        quantized_router(tensors, types)
        types.update({name: "W8A8_DYNAMIC" for name in types if f"{LAYER}.gate." in name})

    directory = spoiled(change)
    refused_on_cpus(
        directory,
        f"{LAYER}.gate: routers of experts of quant type W8A8_DYNAMIC cannot be run here. Types that can: FLOAT.",
    )
    assert main(["doctor", str(directory)]) == 0, capsys.readouterr().out


def test_a_weight_out_of_range(spoiled: Callable[[Change], Path]) -> None:
    """`doctor` does not read weights."""

    def change(tensors: Tensors, types: Types) -> None:
        tensors[f"{LAYER}.experts.3.down_proj.weight"][1, 2] = 8

    name = f"{LAYER}.experts.3.down_proj.weight"
    refused_on_cpus(spoiled(change), f"tensor {name}: expected int4 values in [-8, 7], found values from")


@pytest.mark.parametrize("is_quantized", [True, False], ids=["in int4", "in float"])
@pytest.mark.parametrize("name", MODELS)
def test_a_vision_part_described_as_w4a4(
    name: str, is_quantized: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether its tensors are what the description says or not."""
    write_model(name, tmp_path, True)
    file = tmp_path / "model.safetensors"
    tensors, types = load_file(file), json.loads((tmp_path / DESCRIPTION).read_text())
    layer = next(key for key in tensors if "visual.blocks.0.mlp." in key and key.endswith(".weight"))
    layer = layer.removesuffix(".weight")
    new = {f"{layer}.weight": tensors[f"{layer}.weight"]}
    if is_quantized:
        scale = new[f"{layer}.weight"].abs().amax(1, keepdim=True) / 7
        codes = (new[f"{layer}.weight"] / scale).round().to(torch.int8)
        new |= {f"{layer}.weight": codes, f"{layer}.weight_scale": scale}
        new[f"{layer}.weight_offset"] = torch.zeros_like(scale)
    save_file(tensors | new, file, {"format": "pt"})
    (tmp_path / DESCRIPTION).write_text(json.dumps(types | dict.fromkeys(new, "W4A4_DYNAMIC")))
    expected = f"{DESCRIPTION}: layer {layer}: vision parts of quant type W4A4_DYNAMIC cannot be run "
    if not is_quantized:
        expected = f"layer {layer}, tensor {layer}.weight: expected dtype I8 or U8 for W4A4_DYNAMIC, found F32"
    for answer in three_answers(tmp_path, capsys):
        assert expected in answer
