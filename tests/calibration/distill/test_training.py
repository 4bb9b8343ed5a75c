# SPDX-License-Identifier: Apache-2.0
"""Training of the quantized model: what it changes, and what it gains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibration.running import bytes_of, divergence, job, quantize
from vllm_w4a4_plugin.calibration.block import quantizer
from vllm_w4a4_plugin.calibration.distill import schedule
from vllm_w4a4_plugin.calibration.model.block import LoadedBlock
from vllm_w4a4_plugin.calibration.run.pipeline import Quantization
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings


def test_it_repairs_scales(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight scales that are wrong by a fifth are the kind of error that training must correct."""
    original = quantizer.collect_tensors

    def disturbed(block: LoadedBlock, linears: Any) -> tuple[dict[str, torch.Tensor], dict[str, QuantType]]:
        tensors, types = original(block, linears)
        generator = torch.Generator().manual_seed(block.index)
        for name, tensor in tensors.items():
            if name.endswith("weight_scale"):
                tensor.mul_(torch.exp(0.2 * torch.randn(tensor.shape, generator=generator)))
        return tensors, types

    monkeypatch.setattr(quantizer, "collect_tensors", disturbed)
    monkeypatch.setitem(schedule.RATES, "log_scale", 1e-2)
    directory = float_model("qwen3")
    before = quantize(directory, tmp_path / "before", ids, "all-w4a4")
    after = quantize(directory, tmp_path / "after", ids, "all-w4a4", distill=120)
    reader, start = CheckpointReader(after), CheckpointReader(before)
    assert [*header_findings(reader), *value_findings(reader)] == []
    assert {n: (t.dtype, t.shape) for n, t in reader.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in start.tensors.items()
    }
    for name in reader.tensors:
        if name.endswith("proj.weight"):
            assert torch.equal(reader.load(name), start.load(name))
        elif name.endswith("_trans"):
            assert not torch.equal(reader.load(name), start.load(name))
    assert divergence(directory, after, ids) < 0.7 * divergence(directory, before, ids)


def test_training_that_does_not_help_on_held_out_text_is_undone(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(schedule.RATES, "log_scale", 0.3)
    directory = float_model("llama")
    start = quantize(directory, tmp_path / "start", ids)
    outcome = Quantization(job(directory, ids, distill=4), tmp_path / "out").run()
    assert outcome.distillation
    assert outcome.distillation.start < outcome.distillation.end  # type: ignore[operator]
    assert not outcome.distillation.kept
    assert str(outcome.distillation).endswith("; undone, since it did not help")
    assert bytes_of(tmp_path / "out") == bytes_of(start)


def test_the_divergence_that_decides_is_that_of_held_out_text(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    """Against the logits of the finished checkpoints, which are computed from their files."""
    directory = float_model("qwen3")
    this = job(directory, ids, "all-w4a4", distill=8)
    outcome = Quantization(this, tmp_path / "out").run()
    start = quantize(directory, tmp_path / "start", ids, "all-w4a4")
    assert outcome.distillation
    held_out = this.text.held_out
    assert outcome.distillation.start == pytest.approx(divergence(directory, start, held_out), rel=1e-3)
    kept = divergence(directory, tmp_path / "out", held_out)
    expected = outcome.distillation.end if outcome.distillation.kept else outcome.distillation.start
    assert expected == pytest.approx(kept, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_default_makes_no_random_model_worse_on_held_out_text(
    family: str, float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    directory = float_model(family)
    this = job(directory, ids, distill=schedule.DEFAULT_STEPS)
    Quantization(this, tmp_path / "distilled").run()
    start = quantize(directory, tmp_path / "start", ids)
    before, after = (divergence(directory, out, this.text.held_out) for out in (start, tmp_path / "distilled"))
    assert after <= before * 1.0001


def test_one_row_alone_is_trained_on_and_judges_nothing(
    float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    outcome = Quantization(job(float_model("llama"), ids.view(1, -1)[:, :512], distill=2), tmp_path / "out").run()
    assert outcome.distillation
    assert (outcome.distillation.start, outcome.distillation.kept) == (None, True)
    assert str(outcome.distillation) == "2 steps"
