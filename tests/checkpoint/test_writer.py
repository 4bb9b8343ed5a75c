# SPDX-License-Identifier: Apache-2.0
"""The writer, read back with safetensors' own reader."""

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.writer import write_checkpoint

TENSORS = {
    "model.a.weight": torch.arange(24, dtype=torch.int8).view(4, 6),
    "model.a.weight_scale": torch.rand(4, 1),
    "model.b.weight": torch.randn(5, 3, dtype=torch.bfloat16),
    "model.c.weight": torch.randn(7, 7),
}
TYPES = {name: QuantType.W8A8_DYNAMIC if ".a." in name else QuantType.FLOAT for name in TENSORS}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "float"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", "quantization_config": {"bits": 4}}')
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "vocab.json"):
        (directory / name).write_text(name)
    (directory / "tokenizer.json").chmod(0o400)
    (directory / "model.safetensors.index.json").write_text("{}")
    (directory / "pytorch_model.bin").write_text("old")
    return directory


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    names = list(TENSORS)
    files = [tmp_path / "part-0.safetensors", tmp_path / "part-1.safetensors"]
    save_file({n: TENSORS[n] for n in names[:2]}, files[0])
    save_file({n: TENSORS[n] for n in names[2:]}, files[1])
    return files


@pytest.mark.parametrize(("limit", "shards"), [(10**9, 1), (60, 3), (1, 4)])
def test_tensors_come_back_whatever_the_shard_size(
    limit: int, shards: int, source: Path, parts: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    write_checkpoint(source, output, parts, TYPES, shard_bytes=limit)
    files = sorted(output.glob("*.safetensors"))
    stem = "quant_model_weight_w4a4_flatquant_dynamic"
    assert [f.name for f in files] == [f"{stem}-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    index = json.loads((output / f"{stem}.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert list(index["weight_map"]) == list(TENSORS)
    assert CheckpointReader(output).description.tensors == TYPES


def test_small_files_are_copied_with_normal_permissions(source: Path, parts: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_checkpoint(source, output, parts, TYPES)
    small = {f.name for f in output.iterdir() if "quant_model" not in f.name}
    assert small == {"config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "vocab.json"}
    assert {stat.S_IMODE(f.stat().st_mode) for f in output.iterdir()} == {0o644}
    config = json.loads((output / "config.json").read_text())
    assert config == {"model_type": "llama", "quantize": "w4a4_flatquant_dynamic"}


@pytest.mark.parametrize("broken", ["no such part", "cut short", "no type"])
def test_failure_leaves_nothing(broken: str, source: Path, parts: list[Path], tmp_path: Path) -> None:
    types = dict(TYPES)
    if broken == "no type":
        types.pop("model.c.weight")
    elif broken == "cut short":
        data = parts[1].read_bytes()
        parts[1].write_bytes(data[:-10])
    else:
        (source / "config.json").unlink()
    before = {f.name for f in tmp_path.iterdir()}
    with pytest.raises(CheckpointError):
        write_checkpoint(source, tmp_path / "out", parts, types)
    assert {f.name for f in tmp_path.iterdir()} == before


def test_existing_output_is_refused(source: Path, parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        write_checkpoint(source, source, parts, TYPES)
