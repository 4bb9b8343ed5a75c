# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with an int8 output head: what is written, what it computes, and for which models it is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.calibration.running import bytes_of, quantize, relative_logit_error
from vllm_w4a4_plugin.calibration import CalibrationError, QuantizeOptions
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.calibration.run import outer
from vllm_w4a4_plugin.calibration.run.preparation import Preparation
from vllm_w4a4_plugin.calibration.simulate import float_logits, quantized_logits
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings

W8A8 = QuantType.W8A8_DYNAMIC
HEAD = "lm_head.weight"


@pytest.fixture
def both(float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A float model, the same quantized with a FLOAT head, and with an int8 head."""
    directory = float_model("qwen3", tie_word_embeddings=False)
    return (
        directory,
        quantize(directory, tmp_path / "float", ids),
        quantize(directory, tmp_path / "int8", ids, head=W8A8),
    )


def test_nothing_but_the_head_differs(both: tuple[Path, Path, Path]) -> None:
    plain, written = (CheckpointReader(directory) for directory in both[1:])
    assert [*header_findings(written), *value_findings(written)] == []
    suffixes = {"weight": ("I8", (512, 96)), "weight_scale": ("F32", (512, 1)), "weight_offset": ("F32", (512, 1))}
    found = {name: (info.dtype, info.shape) for name, info in written.tensors.items()}
    assert {name: found.pop(f"lm_head.{name}") for name in suffixes} == suffixes
    assert found == {name: (info.dtype, info.shape) for name, info in plain.tensors.items() if name != HEAD}
    assert all(torch.equal(written.load(name), plain.load(name)) for name in found)
    types = written.description.tensors
    assert [name for name, kind in types.items() if name.startswith("lm_head.")] == list(types)[-3:]
    assert {types[f"lm_head.{name}"] for name in suffixes} == {"W8A8_DYNAMIC"}
    assert written.description.modules["model.embed_tokens"] == "FLOAT"


def test_codes_are_within_half_a_step_of_the_weight(both: tuple[Path, Path, Path]) -> None:
    exact, written = CheckpointReader(both[1]).load(HEAD).double(), CheckpointReader(both[2])
    codes, scale = written.load(HEAD).double(), written.load("lm_head.weight_scale").double()
    is_clipped = codes.abs() == 127
    assert ((codes * scale - exact).abs() <= 0.501 * scale)[~is_clipped].all()
    largest = exact.abs().amax(1, keepdim=True)
    plain = (exact / (largest / 127)).round() * largest / 127
    # No row is worse than with the plain scale, which is one of those that are tried.
    assert ((codes * scale - exact).square().sum(1) <= (plain - exact).square().sum(1) * (1 + 1e-5)).all()


def test_the_simulation_computes_with_the_head(both: tuple[Path, Path, Path], ids: torch.Tensor) -> None:
    """The hidden state is that of the other checkpoint, whose head is float and can be inverted."""
    directory, plain, written = both
    model, rows = StreamedModel(directory), ids[:2]
    logits = torch.cat(list(quantized_logits(model, plain, rows))).double()
    hidden = torch.linalg.lstsq(CheckpointReader(plain).load(HEAD).double(), logits.T).solution.T
    reader = CheckpointReader(written)
    step = hidden.abs().amax(1, keepdim=True) / 127
    weight = reader.load(HEAD).double() * reader.load("lm_head.weight_scale").double()
    expected = (hidden / step).round() * step @ weight.T
    found = torch.cat(list(quantized_logits(StreamedModel(directory), written, rows))).double()
    assert (found - expected).norm() < 2e-3 * expected.norm()
    assert (found - logits).norm() > 4e-3 * logits.norm(), "rounding must show, or the comparison would prove nothing"


def test_rows_are_rounded_in_portions(both: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = CheckpointReader(both[1])
    weight = {HEAD: reader.load(HEAD)}
    whole = outer.with_head(weight, W8A8)
    monkeypatch.setattr(outer, "ROWS_AT_ONCE", 100)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in outer.with_head(weight, W8A8).items())


def test_a_rotated_model_may_tie_its_head(float_model: Callable[..., Path], ids: torch.Tensor, tmp_path: Path) -> None:
    """A rotation makes two matrices of one, so the head is no longer the embedding."""
    directory = float_model("llama")
    written = quantize(directory, tmp_path / "out", ids, "w4a4-dynamic", head=W8A8)
    reader = CheckpointReader(written)
    assert [*header_findings(reader), *value_findings(reader)] == []
    assert reader.description.tensors[HEAD] == "W8A8_DYNAMIC"
    assert relative_logit_error(directory, written, ids[:4]) < 0.45


def prepared(directory: Path, output: Path, **options: object) -> Preparation:
    return Preparation(directory, output, QuantizeOptions(head="W8A8_DYNAMIC", distill=0, **options))


def test_a_tied_head_is_refused(float_model: Callable[..., Path], tmp_path: Path) -> None:
    directory = float_model("llama")
    with pytest.raises(CalibrationError, match=r"ties its output head to the embedding.*Leave out `head`"):
        prepared(directory, tmp_path / "out")
    assert prepared(directory, tmp_path / "out", recipe="w4a4-dynamic").settings.head == "W8A8_DYNAMIC"


def test_another_type_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"`head`: input should be 'FLOAT' or 'W8A8_DYNAMIC', found 'W4A4'"):
        QuantizeOptions(head="W4A4")


def test_distillation_of_a_checkpoint_keeps_its_head(
    both: tuple[Path, Path, Path], float_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory, _, start = both
    options = QuantizeOptions(start_from=start, distill=1)
    assert Preparation(directory, tmp_path / "out", options).settings.head == "W8A8_DYNAMIC"
    options = QuantizeOptions(start_from=start, distill=1, head="FLOAT")
    assert Preparation(directory, tmp_path / "out", options).settings.head == "FLOAT"


def test_an_int8_head_changes_logits_by_a_percent(both: tuple[Path, Path, Path], ids: torch.Tensor) -> None:
    directory, plain, written = both
    exact = torch.stack(list(float_logits(StreamedModel(directory), ids[:2])))
    errors = []
    for checkpoint in (plain, written):
        found = torch.stack(list(quantized_logits(StreamedModel(directory), checkpoint, ids[:2])))
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert abs(errors[1] - errors[0]) < 0.01
    assert bytes_of(plain) != bytes_of(written)
