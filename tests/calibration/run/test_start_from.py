# SPDX-License-Identifier: Apache-2.0
"""Distillation that starts from a finished checkpoint, of this tool or of the official one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.calibration.running import bytes_of, job, quantize
from tests.conftest import DESCRIPTION, INDEX, MICRO, WEIGHTS
from vllm_w4a4_plugin.calibration.distill import training
from vllm_w4a4_plugin.calibration.errors import CalibrationError
from vllm_w4a4_plugin.calibration.run.pipeline import Quantization
from vllm_w4a4_plugin.calibration.run.start_from import StartingPoint
from vllm_w4a4_plugin.calibration.run.work import WorkDirectory
from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings
from vllm_w4a4_plugin.cli import main


def distilled(directory: Path, start: Path, output: Path, ids: torch.Tensor, steps: int) -> Path:
    plain = job(directory, ids, distill=steps)
    started = replace(plain, start_from=StartingPoint(plain.model, CheckpointReader(start)))
    Quantization(started, output).run()
    return output


@pytest.mark.parametrize("recipe", ["tutorial", "all-w4a4"])
def test_the_result_is_byte_identical_to_that_of_one_run(
    recipe: str,
    float_model: Callable[..., Path],
    ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "_mean_divergence", lambda *_: None)  # keep the result, whether it helps or not
    directory = float_model("llama")
    whole = quantize(directory, tmp_path / "whole", ids, recipe, distill=3)
    start = quantize(directory, tmp_path / "start", ids, recipe)
    output = distilled(directory, start, tmp_path / "out", ids, 3)
    assert bytes_of(output) == bytes_of(whole) != bytes_of(start)
    assert not WorkDirectory(output).path.exists()


def test_a_checkpoint_of_the_official_tool_is_distilled(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    official = CheckpointReader(MICRO)
    config = json.loads((MICRO / "config.json").read_text())
    config.pop("quantize")
    source = tmp_path / "float"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16).save_pretrained(source)
    (source / "config.json").write_text(json.dumps(config))
    file = source / "model.safetensors"
    # The float model is not stored with the micro checkpoint; what makes it out is the embedding.
    tensors = load_file(file)
    save_file({name: t if ".layers." in name else official.load(name) for name, t in tensors.items()}, file)
    ids = torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    reader = CheckpointReader(distilled(source, MICRO, tmp_path / "out", ids, 2))
    assert [*header_findings(reader), *value_findings(reader)] == []
    assert reader.description.tensors == official.description.tensors
    for name in official.tensors:
        if name.endswith("proj.weight"):
            assert torch.equal(reader.load(name), official.load(name))


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("tutorial", {"initializer_range": 0.05}, "embed_tokens.weight differs from that of"),
        ("tutorial", {"intermediate_size": 128}, "has shape .*160.* but .* with shape .*128"),
        ("w4a4-dynamic", {}, "has quant type W4A4_DYNAMIC"),
    ],
)
def test_what_cannot_be_started_from_is_refused(
    recipe: str,
    changes: dict[str, float],
    message: str,
    float_model: Callable[..., Path],
    ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    start = quantize(float_model("qwen3"), tmp_path / "start", ids, recipe)
    with pytest.raises(CalibrationError, match=message):
        distilled(float_model("qwen3", **changes), start, tmp_path / "out", ids, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["start"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "tutorial"], "leave out --recipe, --keep-float and --gradients"),
        (["--distill", "0"], "set --distill to a number of steps"),
        ([], ""),
    ],
)
def test_from_the_command_line(
    arguments: list[str],
    message: str,
    float_model: Callable[..., Path],
    ids: torch.Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory, text, output = float_model("llama"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    start = quantize(directory, tmp_path / "start", ids)
    command = ["quantize", str(directory), "--output", str(output), "--start-from", str(start), "--distill", "2"]
    assert main([*command, "--calib-file", str(text), *arguments]) == bool(message)
    assert message in capsys.readouterr().err
    assert output.exists() == (not message)
    assert not WorkDirectory(output).path.exists()


def test_clips_of_one_matrix_product_stay_equal_where_no_factor_is_stored(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors that are not stored are the identity; the layers still share their clip."""
    monkeypatch.setattr(training, "_mean_divergence", lambda *_: None)
    directory = float_model("llama")
    start = quantize(directory, tmp_path / "start", ids)
    _remove_factors(start)
    assert [*header_findings(CheckpointReader(start)), *value_findings(CheckpointReader(start))] == []
    reader = CheckpointReader(distilled(directory, start, tmp_path / "out", ids, 8))
    assert [*header_findings(reader), *value_findings(reader)] == []
    for fused in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
        names = [f"model.layers.1.{layer}.clip_ratio" for layer in fused]
        assert len({reader.load(name).item() for name in names}) == 1
        assert reader.load(names[0]) != CheckpointReader(start).load(names[0])


def _remove_factors(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = checkpoint / WEIGHTS
    tensors = load_file(file)
    for name in list(tensors):
        if name.endswith("_trans"):
            del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    for name, key in ((DESCRIPTION, None), (INDEX, "weight_map")):
        data = json.loads((checkpoint / name).read_text())
        entries = data[key] if key else data
        for entry in [entry for entry in entries if entry.endswith("_trans")]:
            del entries[entry]
        (checkpoint / name).write_text(json.dumps(data))
