# SPDX-License-Identifier: Apache-2.0
"""A model that is loaded block by block, compared with transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.calibration.conftest import FAMILIES
from tests.calibration.running import quantize
from vllm_w4a4_plugin.calibration.errors import CalibrationError
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_model_computes_what_transformers_does(family: str, float_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    directory = float_model(family)
    ids = torch.randint(3, 512, (2, 48), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
    model = StreamedModel(directory)
    hidden, _ = model.start(ids)
    with torch.no_grad():
        for index in range(len(model)):
            hidden = model.run_block(model.load_block(index), index, hidden)
        assert torch.allclose(model.logits(hidden), expected, atol=1e-4)


def test_directories_without_a_usable_model_are_refused(tmp_path: Path, float_model: Callable[..., Path]) -> None:
    with pytest.raises(CalibrationError, match=r"no config\.json"):
        StreamedModel(tmp_path)
    (tmp_path / "config.json").write_text((float_model("llama") / "config.json").read_text())
    with pytest.raises(CalibrationError, match=r"no \*\.safetensors"):
        StreamedModel(tmp_path)


def test_blocks_are_new_copies_in_float32(float_model: Callable[..., Path]) -> None:
    model = StreamedModel(float_model("llama"))
    first, second = model.load_block(1), model.load_block(1)
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert one.dtype == torch.float32
        assert one.data_ptr() != two.data_ptr()
        assert torch.equal(one, model.weights.read(f"model.layers.1.{name}").float())


def test_layers_for_multi_token_prediction_are_kept(tmp_path: Path, float_model: Callable[..., Path]) -> None:
    """As DeepSeek and GLM name them, after the last block, and as Qwen does."""
    source = Path(shutil.copytree(float_model("qwen3"), tmp_path / "float"))
    tensors = load_file(source / "model.safetensors")
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    extra = {name.replace(".layers.1.", ".layers.2."): tensor + 1 for name, tensor in last.items()}
    extra |= {"model.layers.2.eh_proj.weight": torch.ones(4, 4), "mtp.fc.weight": torch.ones(2, 4)}
    save_file(tensors | extra, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    ids = torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(0))
    reader = CheckpointReader(quantize(source, tmp_path / "out", ids))
    assert [*header_findings(reader), *value_findings(reader)] == []
    for name, tensor in extra.items():
        assert torch.equal(reader.load(name), tensor)
        assert reader.description.tensors[name] == "FLOAT"
    with pytest.raises(CalibrationError, match=r"is of a layer for multi-token prediction, .* Use another recipe"):
        quantize(source, tmp_path / "rotated", ids, "w4a4-dynamic")
