# SPDX-License-Identifier: Apache-2.0
"""Every family of the table goes through quantize and verify, and computes what its checkpoint describes."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.calibration.running import job
from tests.families import (
    FAMILIES,
    decided_rows,
    fake_quantized_model,
    logits,
    relative_error,
    without_numbers,
    write_model,
)
from vllm_w4a4_plugin.calibration.block.report import NOT_QUANTIZED
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.calibration.run.pipeline import Quantization
from vllm_w4a4_plugin.calibration.run.records import Outcome
from vllm_w4a4_plugin.calibration.simulate import float_logits, quantized_logits
from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.checkpoint.verify import header_findings, remarks, value_findings

LARGEST_ERROR = 2e-3


@pytest.fixture(scope="module", params=FAMILIES)
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path, Outcome]:
    """Name of a family, directory of its float model, checkpoint, and what the run says of it."""
    directory = tmp_path_factory.mktemp(request.param)
    ids = torch.randint(3, 512, (12, 64), generator=torch.Generator().manual_seed(5))
    source, output = write_model(request.param, directory / "float"), directory / "quantized"
    outcome = Quantization(job(source, ids, "all-w4a4", distill=1), output).run()
    return request.param, source, output, outcome


def test_the_float_model_is_computed_as_by_transformers(quantized: tuple[str, Path, Path, Outcome]) -> None:
    _, source, _, _ = quantized
    ids = torch.randint(3, 512, (2, 48), generator=torch.Generator().manual_seed(6))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    found = torch.stack(list(float_logits(StreamedModel(source), ids)))
    assert relative_error(found, logits(model, ids)) < 1e-5


def test_the_checkpoint_is_verified_and_computes_what_it_describes(
    quantized: tuple[str, Path, Path, Outcome],
) -> None:
    family, source, output, _ = quantized
    reader = CheckpointReader(output)
    assert [*header_findings(reader), *value_findings(reader)] == []
    assert (list(remarks(reader)) == []) == FAMILIES[family].is_served  # compared with config.json
    model, kinds = fake_quantized_model(source, output)
    first = "model.layers.0."
    quantized_here = without_numbers(name.removeprefix(first) for name in kinds if name.startswith(first))
    assert quantized_here == FAMILIES[family].quantized
    assert not [name for name in kinds if not name.startswith("model.layers.")]
    assert set(kinds.values()) == {"W4A4_FLATQUANT_DYNAMIC"}
    ids = decided_rows(model, reader.config["vocab_size"])
    found = torch.stack(list(quantized_logits(StreamedModel(source), output, ids)))
    assert relative_error(found, logits(model, ids)) < LARGEST_ERROR


def test_the_report_says_what_could_not_be_done(quantized: tuple[str, Path, Path, Outcome]) -> None:
    family, _, _, outcome = quantized
    first = outcome.records[0]
    kept = [layer.name.removeprefix(f"{first.name}.") for layer in first.layers() if layer.quant_type == "FLOAT"]
    assert tuple(kept) == FAMILIES[family].floats
    assert all(layer.note == NOT_QUANTIZED for layer in first.layers() if layer.quant_type == "FLOAT")
    warning = " ".join(outcome.warnings)
    assert all(name in warning for name in kept)
    assert ("stay FLOAT" in warning) == bool(kept)
    groups = StreamedModel(quantized[1]).groups[0].values()
    plain = [group for group in groups if group.norm is None and group.source is None]
    assert tuple(group.role for group in plain) == FAMILIES[family].plain
    noted = {layer.name.removeprefix(f"{first.name}."): layer.note for layer in first.layers() if layer.note}
    for group in plain:
        assert all(noted[name].startswith("no diagonal: ") for name in group.linears)


def test_the_page_has_the_table() -> None:
    """docs/reference/families.md lists what these tests have shown."""

    def cell(names: Iterable[str]) -> str:
        prefixes = re.compile(r"^(self_attn|mlp|block_sparse_moe)\.")
        return ", ".join(f"`{prefixes.sub('', name)}`" for name in names) or "-"

    rows = [
        f"| `{name}` | `{family.architecture}` | {cell(family.quantized)} | {cell(family.floats)} | "
        f"{cell(family.plain)} |"
        for name, family in FAMILIES.items()
        if family.is_served
    ]
    page = (Path(__file__).parents[2] / "docs/reference/families.md").read_text()
    table = page.partition("| `model_type` |")[2].partition("\n\n")[0].splitlines()[2:]
    assert table == rows
