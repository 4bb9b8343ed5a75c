# SPDX-License-Identifier: Apache-2.0
"""Whole runs on tiny models: what is written, by which rules, and what survives interruptions."""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibration.conftest import FAMILIES
from tests.calibration.running import bytes_of, job, quantize, relative_logit_error
from tests.conftest import DATA, DESCRIPTION, INDEX, MICRO, WEIGHTS
from vllm_w4a4_plugin.calibration.block import moments
from vllm_w4a4_plugin.calibration.devices import DevicePool
from vllm_w4a4_plugin.calibration.distill import training
from vllm_w4a4_plugin.calibration.errors import CalibrationError
from vllm_w4a4_plugin.calibration.progress import Phase, Progress
from vllm_w4a4_plugin.calibration.recipe import RECIPES, Recipe, load_recipe
from vllm_w4a4_plugin.calibration.run import pipeline
from vllm_w4a4_plugin.calibration.run.pipeline import Quantization
from vllm_w4a4_plugin.calibration.run.records import Outcome
from vllm_w4a4_plugin.calibration.run.work import WorkDirectory
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType, load_description
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings

TINY = DATA / "tiny-qwen3-w4a4-w8a8down"
WIDTH = {"F32": 4, "BF16": 2, "I8": 1}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_on_every_family(
    family: str, recipe: str, float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    directory = float_model(family)
    output = quantize(directory, tmp_path / "out", ids, recipe)
    reader = CheckpointReader(output)
    assert [*header_findings(reader), *value_findings(reader)] == []
    # A fold on one side only (norm, v, up, bias) or a wrong transform gives an error near or above 1.
    assert relative_logit_error(directory, output, ids[:4]) < 0.45
    assert not WorkDirectory(output).path.exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_reproduce_the_model(
    family: str, float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    """With rounding made small, what remains of a run is its bookkeeping: it must be the float model."""
    directory = float_model(family)
    eight = Recipe(dict.fromkeys(RECIPES["tutorial"], QuantType.W8A8_DYNAMIC))
    output = quantize(directory, tmp_path / "out", ids, eight)
    assert relative_logit_error(directory, output, ids[:4]) < 0.05


@pytest.mark.parametrize(("recipe", "official"), [("tutorial", MICRO), ("w4a4-w8a8", TINY)])
def test_tensors_are_those_of_the_official_tool(recipe: str, official: Path, tmp_path: Path) -> None:
    """Names, dtypes, shapes, description, config and file names; of `TINY` no more is kept than that."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((official / "config.json").read_text())
    config.pop("quantize")
    source = tmp_path / "float"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model.save_pretrained(source)
    (source / "config.json").write_text(json.dumps(config))
    ids = torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    written = CheckpointReader(quantize(source, tmp_path / "out", ids, recipe))
    assert {n: [t.dtype, list(t.shape)] for n, t in written.tensors.items()} == headers(official)
    assert written.description == load_description(official)
    assert written.config == json.loads((official / "config.json").read_text())
    assert {file.name for file in written.directory.glob("quant_model*")} == {DESCRIPTION, INDEX, WEIGHTS}
    assert written.index_file
    total = json.loads(written.index_file.read_text())["metadata"]["total_size"]
    assert total == sum(prod(shape) * WIDTH[dtype] for dtype, shape in headers(official).values())


def headers(official: Path) -> dict[str, list[Any]]:
    """Dtype and shape of every tensor of a checkpoint of msModelSlim."""
    listing = official / "tensors.json"
    if listing.exists():
        return json.loads(listing.read_text())
    return {n: [t.dtype, list(t.shape)] for n, t in CheckpointReader(official).tensors.items()}


def test_tensors_of_all_w4a4(float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path) -> None:
    """o has no right factor (it is folded into v), down has both."""
    written = CheckpointReader(quantize(float_model("qwen3"), tmp_path / "out", ids, "all-w4a4"))
    common = {"weight_offset": ("F32", (96, 1)), "weight_scale": ("F32", (96, 1)), "clip_ratio": ("F32", (1,))}
    expected = {
        "self_attn.o_proj": {**common, "weight": ("I8", (96, 96)), "left_trans": ("F32", (4, 4))},
        "mlp.down_proj": {
            **common, "weight": ("I8", (96, 160)), "left_trans": ("F32", (10, 10)), "right_trans": ("F32", (16, 16)),
        },
    }  # fmt: skip
    for layer, tensors in expected.items():
        prefix = f"model.layers.1.{layer}."
        assert tensors == {
            n.removeprefix(prefix): (t.dtype, t.shape) for n, t in written.tensors.items() if n.startswith(prefix)
        }
        assert {written.description.tensors[prefix + n] for n in tensors} == {QuantType.W4A4_FLATQUANT_DYNAMIC}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "moment",
    [
        Progress(Phase.GRADIENTS_FORWARD, 1, 2),
        Progress(Phase.GRADIENTS_BACKWARD, 1, 2),
        Progress(Phase.QUANTIZING, 0, 2, "gate_up"),
        Progress(Phase.QUANTIZING, 1, 2),
        Progress(Phase.TEACHER, 1, 2),
        Progress(Phase.DISTILLING, 2, 4),
        Progress(Phase.WRITING, 0, 1),
    ],
)
def test_resumed_run_gives_the_same_bytes(
    moment: Progress, float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    directory = float_model("qwen3")
    whole = quantize(directory, tmp_path / "whole", ids, gradients=True, distill=4)

    def interrupt(progress: Progress) -> None:
        if progress == moment:
            raise Interrupted

    output = tmp_path / "interrupted"
    first = Quantization(job(directory, ids, gradients=True, distill=4), output)
    with pytest.raises(Interrupted):
        first.run(interrupt)
    assert not output.exists()
    assert bytes_of(quantize(directory, output, ids, resume=True, gradients=True, distill=4)) == bytes_of(whole)


def test_distillation_goes_on_from_its_last_kept_step(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = float_model("qwen3")
    monkeypatch.setattr(training, "STEPS_KEPT", 2)
    whole = quantize(directory, tmp_path / "whole", ids, distill=5)
    steps: list[int] = []

    def listen(progress: Progress) -> None:
        if progress.phase is Phase.DISTILLING:
            steps.append(progress.done)

    def interrupt(progress: Progress) -> None:
        if progress == Progress(Phase.DISTILLING, 3, 5):
            raise Interrupted

    output = tmp_path / "interrupted"
    with pytest.raises(Interrupted):
        Quantization(job(directory, ids, distill=5), output).run(interrupt)
    Quantization(job(directory, ids, distill=5), output, resume=True).run(listen)
    assert steps == [2, 3, 4, 5]
    assert bytes_of(output) == bytes_of(whole)


@pytest.mark.parametrize("recipe", ["all-w4a4", "w4a4-w8a8"])
def test_two_devices_give_what_one_gives(
    recipe: str, float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over tokens differ in order only: the first codes are the same, and later ones are as good."""
    directory = float_model("qwen2")
    monkeypatch.setattr(moments, "TOKENS_AT_ONCE", 200)
    one = quantize(directory, tmp_path / "one", ids, recipe)
    devices, two = DevicePool([torch.device("cpu")] * 2), tmp_path / "two"
    Quantization(job(directory, ids, recipe), two, devices=devices, activations_on_disk=True).run()
    reader = CheckpointReader(two)
    assert [*header_findings(reader), *value_findings(reader)] == []
    for layer in ("q", "k", "v"):
        name = f"model.layers.0.self_attn.{layer}_proj.weight"
        assert (reader.load(name) != CheckpointReader(one).load(name)).float().mean() < 0.02
    errors = [relative_logit_error(directory, output, ids[:4]) for output in (one, two)]
    assert errors[1] < 1.1 * errors[0]


def test_interrupted_run_is_not_overwritten_nor_continued_with_other_settings(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    directory, output = float_model("qwen3"), tmp_path / "out"
    Quantization(job(directory, ids), output)
    with pytest.raises(CalibrationError, match="with `resume`"):
        quantize(directory, output, ids)
    with pytest.raises(CalibrationError, match="different settings"):
        quantize(directory, output, ids, resume=True, seed=3)
    with pytest.raises(CalibrationError, match="different calibration text"):
        quantize(directory, output, ids.flip(0), resume=True)


def test_progress_counts_every_phase_up_to_its_total(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    heard: dict[Phase, list[Progress]] = {}
    run = Quantization(job(float_model("llama"), ids, gradients=True, distill=3), tmp_path / "o")
    run.run(lambda progress: heard.setdefault(progress.phase, []).append(progress))
    assert list(heard) == [phase for phase in Phase if phase not in (Phase.CHECKING_WEIGHTS, Phase.GENERATING_TEXT)]
    for news in heard.values():
        assert [p.done for p in news] == sorted(p.done for p in news)
        assert news[-1].done == news[-1].total


def test_seeds_give_different_results(float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path) -> None:
    directory = float_model("llama")
    name = "model.layers.0.mlp.up_proj.right_trans"
    first, second = (
        CheckpointReader(quantize(directory, tmp_path / str(seed), ids, seed=seed)).load(name) for seed in (0, 1)
    )
    assert not torch.equal(first, second)


def test_existing_output_is_left_alone(float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(CalibrationError, match="exists already"):
        quantize(float_model("llama"), tmp_path, ids)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_further_files_appear_with_the_checkpoint(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    directory, output = float_model("llama"), tmp_path / "out"
    run = Quantization(job(directory, ids), output)

    def extras(outcome: Outcome) -> dict[str, str]:
        assert not output.exists()
        return {"size.txt": f"{len(outcome.records)} blocks, {outcome.nbytes} bytes"}

    nbytes = run.run(extra_files=extras).nbytes
    assert nbytes == sum(tensor.nbytes for tensor in CheckpointReader(output).tensors.values())
    assert (output / "size.txt").read_text() == f"2 blocks, {nbytes} bytes"


def test_full_disk_leaves_no_checkpoint_and_can_be_continued(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, output = float_model("llama"), tmp_path / "out"
    original = pipeline.save_tensors

    def full(tensors: dict[str, torch.Tensor], file: Path) -> None:
        if file.name.startswith("block-00001"):
            raise OSError(28, "No space left on device")
        original(tensors, file)

    monkeypatch.setattr(pipeline, "save_tensors", full)
    with pytest.raises(CalibrationError, match="No space left"):
        quantize(directory, output, ids)
    assert not output.exists()
    monkeypatch.setattr(pipeline, "save_tensors", original)
    assert quantize(directory, output, ids, resume=True).is_dir()


def test_keep_float_leaves_layers_as_they_are(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    directory = float_model("llama")
    recipe = load_recipe("tutorial", ["model.layers.1.*"])
    written = CheckpointReader(quantize(directory, tmp_path / "out", ids, recipe))
    source = CheckpointReader(directory)
    kept = [name for name in source.tensors if name.startswith("model.layers.1.")]
    assert kept
    for name in kept:
        assert torch.equal(written.load(name), source.load(name))
        assert written.description.tensors[name] == QuantType.FLOAT
