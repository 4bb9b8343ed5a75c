# SPDX-License-Identifier: Apache-2.0
"""The text part of vision-language models is quantized, the vision part stays FLOAT and as it was."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.calibration.running import quantize
from tests.families import decided_rows, load_fake_quantized, logits, relative_error
from tests.vision import MODELS, WORDS, new_model, published_name, write_float_model
from vllm_w4a4_plugin.calibration.errors import CalibrationError
from vllm_w4a4_plugin.calibration.model.rotated import RotatedModel
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.calibration.simulate import quantized_logits
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings


@pytest.mark.parametrize("name", MODELS)
def test_the_text_part_is_quantized(name: str, tmp_path: Path) -> None:
    source, output = tmp_path / "float", tmp_path / "quantized"
    write_float_model(name, source)
    ids = torch.randint(3, WORDS, (12, 64), generator=torch.Generator().manual_seed(5))
    quantize(source, output, ids, "all-w4a4", distill=1)
    reader, original = CheckpointReader(output), load_file(source / "model.safetensors")
    assert [*header_findings(reader), *value_findings(reader)] == []
    tower = [key for key in original if "visual." in key]
    assert tower
    for key in tower:
        assert reader.description.tensors[key] == QuantType.FLOAT
        assert torch.equal(reader.load(key), original[key])
    model = new_model(name)
    kinds = load_fake_quantized(model, source, output, partial(published_name, name))
    assert len(kinds) == 14
    assert not [key for key in kinds if "visual" in key]
    rows = decided_rows(model, WORDS)
    found = torch.stack(list(quantized_logits(StreamedModel(source), output, rows)))
    assert relative_error(found, logits(model, rows)) < 2e-3


def test_a_rotation_is_refused(tmp_path: Path) -> None:
    """The vision part of Qwen3-VL adds its own features to the residual stream, in a basis that is not rotated."""
    write_float_model("qwen3_vl", tmp_path)
    with pytest.raises(CalibrationError, match=r"vision part of this qwen3_vl model .* Use another recipe"):
        RotatedModel(tmp_path)
