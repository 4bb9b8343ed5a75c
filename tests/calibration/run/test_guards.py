# SPDX-License-Identifier: Apache-2.0
"""Calibration text that is unfit, damaged weights and zero norms: what a run makes of them, or says."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.calibration.running import TUTORIAL_BITS, divergence, job, nearest_divergence, quantize
from vllm_w4a4_plugin import calibration
from vllm_w4a4_plugin.calibration import CalibrationError, QuantizeOptions
from vllm_w4a4_plugin.calibration.block.guard import ROUNDED
from vllm_w4a4_plugin.calibration.run import work
from vllm_w4a4_plugin.calibration.run.pipeline import Quantization
from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings

BITS: Mapping[str, Mapping[str, int]] = {
    "tutorial": TUTORIAL_BITS,
    "w4a4-w8a8": {**TUTORIAL_BITS, "down_proj": 8},
    "all-w4a4": {**TUTORIAL_BITS, "o_proj": 4, "down_proj": 4},
}


def repeated(distinct: int) -> torch.Tensor:
    """Token ids [12, 64], of which few are different."""
    return 40 + torch.arange(12 * 64).view(12, 64) % distinct


@pytest.mark.parametrize("distinct", [1, 10])
@pytest.mark.parametrize("recipe", BITS)
def test_text_that_repeats_itself_is_no_worse_than_rounding_to_nearest(
    recipe: str, distinct: int, float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    """Measured on other text. Without the guards, one distinct token makes the divergence many times as large."""
    directory = float_model("qwen3")
    outcome = Quantization(job(directory, repeated(distinct), recipe, distill=4), tmp_path / "out").run()
    reader = CheckpointReader(tmp_path / "out")
    assert [*header_findings(reader), *value_findings(reader)] == []
    assert divergence(directory, tmp_path / "out", ids) <= 1.1 * nearest_divergence(directory, ids, BITS[recipe])
    (warning,) = outcome.warnings
    assert all(layer.name in warning for layer in outcome.fallbacks if layer.fallback == ROUNDED)


def test_a_beginning_that_repeats_itself_does_no_harm(float_model: Callable[..., Path], tmp_path: Path) -> None:
    """As many tokens as are used, of ten kinds, in front of good text; measured on more of the good text."""
    from transformers import AutoTokenizer

    directory, text = float_model("qwen3"), tmp_path / "text.txt"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = torch.randint(3, 512, (20_000,), generator=torch.Generator().manual_seed(0))
    good = tokenizer.decode(tokens)
    text.write_text("a b c d e " * 800 + good[: len(good) * 3 // 4])
    ids = torch.tensor(tokenizer(good[len(good) * 3 // 4 :], add_special_tokens=False).input_ids[:768]).view(12, 64)
    options = QuantizeOptions(calib_file=text, calib_tokens=2048, distill=0)
    report = calibration.quantize(directory, tmp_path / "out", options)
    assert report.warnings == []
    assert report.fallbacks == []
    assert divergence(directory, report.output, ids) < nearest_divergence(directory, ids)


def test_calibration_on_good_text_is_kept_and_better_than_rounding(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    directory = float_model("qwen3")
    other = torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(77))
    for recipe, bits in BITS.items():
        outcome = Quantization(job(directory, ids, recipe), tmp_path / recipe).run()
        assert divergence(directory, tmp_path / recipe, other) < nearest_divergence(directory, other, bits)
        assert [layer for layer in outcome.fallbacks if layer.fallback == ROUNDED] == []
        assert all(layer.after <= 1.01 * layer.before for layer in outcome.layers if layer.before is not None)  # type: ignore[operator]


def test_too_few_different_tokens_are_reported(
    float_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("never " * 3000)
    options = QuantizeOptions(calib_file=text, calib_tokens=1024, distill=2)
    with caplog.at_level(logging.WARNING, logger="vllm_w4a4_plugin.calibration"):
        report = calibration.quantize(float_model("llama"), tmp_path / "out", options)
    logged = [record.getMessage() for record in caplog.records]
    page = (report.output / "quantization_report.html").read_text()
    assert f"{text}: only " in report.warnings[0]
    assert "different token" in report.warnings[0]
    for warning in report.warnings:
        assert warning in logged
    assert str(text) in page
    assert "different token" in page
    assert "random tokens" in page
    assert {layer.name in report.warnings[1] for layer in report.fallbacks} == {True}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.self_attn.k_proj.weight", float("nan")),
        ("model.layers.0.post_attention_layernorm.weight", float("inf")),
        ("model.norm.weight", float("-inf")),
        ("model.embed_tokens.weight", float("nan")),
    ],
)
@pytest.mark.parametrize("with_text", [True, False])
def test_weights_that_are_not_finite_are_named_before_anything_is_written(
    with_text: bool, name: str, value: float, float_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(float_model("llama"), tmp_path / "model"))
    edit(directory, name, lambda tensor: tensor.view(-1)[-2:].fill_(value))
    text = tmp_path / "text.json"
    text.write_text(json.dumps(["The quick brown fox jumps over the lazy dog. " * 40] * 4))
    options = QuantizeOptions(calib_file=text if with_text else None, calib_tokens=1024)
    with pytest.raises(
        CalibrationError, match=rf"model\.safetensors: tensor {name} has 2 of \d+ values that are NaN or"
    ):
        calibration.quantize(directory, tmp_path / "out", options)
    assert {file.name for file in tmp_path.iterdir()} == {"model", "text.json"}


@pytest.mark.parametrize("recipe", ["all-w4a4", "w4a4-w8a8", "w4a4-dynamic"])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_zeros_are_quantized(
    name: str, recipe: str, float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(float_model("qwen3"), tmp_path / "model"))
    edit(directory, name, torch.Tensor.zero_)
    output = quantize(directory, tmp_path / "out", ids, recipe, distill=1, gradients=True)
    reader = CheckpointReader(output)
    assert [*header_findings(reader), *value_findings(reader)] == []
    assert divergence(directory, output, ids[:4]) < 0.3


def test_zero_rows_of_a_weight_are_quantized(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(float_model("qwen3"), tmp_path / "model"))
    for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
        edit(directory, f"model.layers.0.{layer}.weight", lambda tensor: tensor[:30].zero_())
    output = quantize(directory, tmp_path / "out", ids, "all-w4a4")
    assert divergence(directory, output, ids[:4]) < 0.3
    assert CheckpointReader(output).load("model.layers.0.self_attn.q_proj.weight")[:30].eq(0).all()


def edit(directory: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, {"format": "pt"})


def test_a_run_of_another_version_is_not_continued(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, output = float_model("qwen3"), tmp_path / "out"
    started = Quantization(job(directory, ids), output)
    version = work.code_version()
    with monkeypatch.context() as patch:
        patch.setattr("vllm_w4a4_plugin.calibration.run.job.code_version", lambda: "vllm-w4a4-plugin 9.9")
        with pytest.raises(CalibrationError) as error:
            quantize(directory, output, ids, resume=True)
        assert f"was started by {version}, this is vllm-w4a4-plugin 9.9" in str(error.value)
    identity = started.work.path / "run.json"
    kept = identity.read_text()
    old = json.loads(kept)
    del old["version"]
    identity.write_text(json.dumps(old))
    with pytest.raises(CalibrationError, match=r"was started by an earlier version, this is vllm-w4a4-plugin \d"):
        quantize(directory, output, ids, resume=True)
    identity.write_text(kept)
    quantize(directory, output, ids, resume=True)


def test_the_version_tells_changed_algorithms_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any change of a source file of calibration is another version."""
    package = Path(work.__file__).parent.parent
    copy = tmp_path / "calibration"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(work, "__file__", str(copy / "run" / "work.py"))
    assert work.code_version.__wrapped__() == work.code_version()
    (copy / "block" / "rounding.py").open("a").write("\nSWEEPS = 4\n")
    assert work.code_version.__wrapped__() != work.code_version()
