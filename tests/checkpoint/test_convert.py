# SPDX-License-Identifier: Apache-2.0
"""Conversion between the forms of a checkpoint, against an oracle that packs value by value."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.cases import write_case
from tests.conftest import INDEX, MICRO, WEIGHTS
from tests.mixtures import write_mixture
from tests.packing import packed, unpacked
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.checkpoint.convert import Form, convert
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings
from vllm_w4a4_plugin.cli import main

PACK, UNPACK = Form(packed=True), Form(packed=False)
W4A4 = "W4A4_FLATQUANT_DYNAMIC"


def findings(directory: Path) -> list[str]:
    reader = CheckpointReader(directory)
    return list(header_findings(reader)) or list(value_findings(reader))


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(directory)
    return {name: reader.load(name) for name in reader.tensors}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    same = (first[n].dtype == second[n].dtype and first[n].equal(second[n]) for n in first)
    return first.keys() == second.keys() and all(same)


def test_packed_weights_are_those_of_the_oracle(tmp_path: Path) -> None:
    result = convert(MICRO, tmp_path / "packed", PACK)
    before, after = tensors(MICRO), tensors(tmp_path / "packed")
    types = CheckpointReader(MICRO).description.tensors
    weights = {name for name in before if types[name] == W4A4 and name.endswith(".weight")}
    assert len(weights) == result.weights == 10
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name in weights:
            assert after[name].dtype == torch.uint8
            assert np.array_equal(after[name].numpy(), packed(tensor.numpy()))
            assert np.array_equal(unpacked(after[name].numpy()), tensor.numpy())
        else:
            assert after[name].dtype == tensor.dtype
            assert after[name].equal(tensor)
    saved = sum(before[name].nbytes for name in weights) // 2
    assert result.bytes_before - result.bytes_after == saved
    assert findings(tmp_path / "packed") == []


def test_packing_and_unpacking_gives_back_every_file(tmp_path: Path) -> None:
    convert(MICRO, tmp_path / "packed", PACK)
    convert(tmp_path / "packed", tmp_path / "back", UNPACK)
    before, after = contents(MICRO), contents(tmp_path / "back")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name] and name != INDEX] == []
    assert json.loads(before[INDEX]) == json.loads(after[INDEX])


@pytest.mark.parametrize("name", ["c1_moe_w4", "f4_group3d", "n3_glm4", "mixture"])
def test_other_checkpoints_come_back(name: str, tmp_path: Path) -> None:
    """Experts, groups, fused modules; none of them loses a bit, and `verify` accepts each form."""
    source = tmp_path / "source"
    if name == "mixture":
        write_mixture(source, (W4A4, "W4A4_DYNAMIC", "W8A8_DYNAMIC"), experts=2)
    else:
        write_case(name, source)
    result = convert(source, tmp_path / "packed", PACK)
    assert result.weights > 0
    assert findings(tmp_path / "packed") == []
    assert not equal(tensors(source), tensors(tmp_path / "packed"))
    convert(tmp_path / "packed", tmp_path / "back", UNPACK)
    assert equal(tensors(source), tensors(tmp_path / "back"))


@pytest.mark.parametrize(("naming", "stem"), [("v0", WEIGHTS.partition("-")[0]), ("v1", "quant_model_weights")])
def test_names_and_shards(naming: str, stem: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = convert(MICRO, output, Form(naming=naming, shard_bytes=300_000))
    names = sorted(file.name for file in output.glob("*.safetensors"))
    assert names == [f"{stem}-{i:05d}-of-{result.files:05d}.safetensors" for i in range(1, result.files + 1)]
    assert result.files > 4
    assert [file.name for file in output.glob("*.index.json")] == [f"{stem}.safetensors.index.json"]
    assert all(sum(t.nbytes for t in load_file(output / name).values()) <= 300_000 for name in names)
    assert equal(tensors(MICRO), tensors(output))
    assert findings(output) == []


def test_a_name_in_the_description_does_not_become_a_path(
    micro_copy: Path, tmp_path: Path, edit_json: Callable
) -> None:
    edit_json("quant_model_description.json", {"model_quant_type": "../../elsewhere/x"})
    convert(micro_copy, tmp_path / "a" / "out", Form(naming="v0"))
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"out"}
    assert (tmp_path / "a" / "out" / WEIGHTS).exists()


def test_an_odd_number_of_rows_stays_unpacked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    written = write_mixture(source, ("W4A4_DYNAMIC",), experts=2)
    directory = odd_rows(source, written)
    result = convert(directory, tmp_path / "packed", PACK)
    assert len(result.unpackable) == 4
    assert all("gate_proj" in name or "up_proj" in name for name in result.unpackable)
    assert tensors(tmp_path / "packed")[result.unpackable[0]].dtype == torch.int8


def odd_rows(directory: Path, values: dict[str, torch.Tensor]) -> Path:
    """Experts with 88 + 1 intermediate features; down has one group, so that its inputs need not be even."""
    from tests.mixtures import write

    def shortened(name: str, value: torch.Tensor) -> torch.Tensor:
        if ".experts." not in name:
            return value
        return (
            value[:, :89].contiguous()
            if "down_proj.weight" in name and value.shape[1] > 1
            else (value if "down_proj" in name else value[:89].contiguous())
        )

    types = CheckpointReader(directory).description.tensors
    config = json.loads((directory / "config.json").read_text())
    write(directory, {name: shortened(name, value) for name, value in values.items()}, types)
    (directory / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 89}))
    return directory


def test_values_that_are_no_int4_are_refused(
    micro_copy: Path, edit_tensors: Callable[..., None], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    codes = torch.zeros_like(CheckpointReader(MICRO).load(name))
    codes[-1, -1] = 8
    edit_tensors({name: codes})
    with pytest.raises(CheckpointError, match=rf"tensor {name}: expected int4 values .* found values from 0 to 8"):
        convert(micro_copy, tmp_path / "out", PACK)
    assert [file.name for file in tmp_path.iterdir()] == ["micro"]


def test_a_damaged_checkpoint_is_refused(micro_copy: Path, edit_tensors: Callable[..., None], tmp_path: Path) -> None:
    edit_tensors(remove=("model.layers.1.mlp.up_proj.weight_scale",))
    with pytest.raises(CheckpointError, match=r"cannot be converted, .*up_proj.weight_scale"):
        convert(micro_copy, tmp_path / "out", PACK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["exception", "kill"])
def test_an_interrupted_run_leaves_nothing_that_looks_complete(way: str, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from vllm_w4a4_plugin.checkpoint.convert import Form, convert\n"
        "def wrote(done, total):\n"
        "    if done > total // 2:\n"
        f"        {'raise KeyboardInterrupt' if way == 'exception' else 'os.kill(os.getpid(), signal.SIGKILL)'}\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), Form(packed=True), wrote)\n"
    )
    command = [sys.executable, "-c", script, str(MICRO), str(tmp_path / "out")]
    assert subprocess.run(command, capture_output=True).returncode != 0
    left = [file.name for file in tmp_path.iterdir()]
    assert left == ([] if way == "exception" else [".out.writing"])
    if way == "kill":
        with pytest.raises(CheckpointError):
            CheckpointReader(tmp_path / ".out.writing").description  # noqa: B018
    convert(MICRO, tmp_path / "out", PACK)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """600 MB of weights are packed, unpacked and written in other shards by a process that may use 100 MB for it."""
    source = tmp_path / "source"
    source.mkdir()
    large = (20_000, 10_000)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    header, offset, data = {}, 0, []
    for name in names:
        for suffix, shape, dtype, width in (("weight", large, "I8", 1), ("weight_scale", (large[0], 1), "F32", 4)):
            size = shape[0] * shape[1] * width
            header[f"{name}.{suffix}"] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
    data = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + offset)
    (source / "config.json").write_text('{"architectures": ["Unknown"]}')
    description = dict.fromkeys(header, "W4A4_DYNAMIC")
    (source / "quant_model_description.json").write_text(json.dumps(description))
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from vllm_w4a4_plugin.checkpoint.convert import Form, convert\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "a, b, c = map(Path, sys.argv[1:])\n"
        "convert(a, b, Form(packed=True))\n"
        "convert(b, c, Form(packed=False, shard_bytes=10**8))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "packed"), str(tmp_path / "back")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 150_000  # KiB


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(MICRO), "--output", str(tmp_path / "out"), "--pack", "--shard-size", "0.5MB"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no bar, and no line before ten seconds
    assert captured.out.splitlines()[0] == "10 weights packed"
    assert "(before: 1,319,976)" in captured.out
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    assert len(CheckpointReader(tmp_path / "out").tensors) == 79
    assert main(["convert", str(MICRO), "--output", str(tmp_path / "out"), "--pack"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(MICRO), "--output", str(tmp_path / "other")]) == 1
    assert "convert needs something to do" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["4", "0GB", "GB", "-1GB", "1.5.2GB", "4XB"])
def test_sizes_that_are_none(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_w4a4_plugin.cli.convert import size as parse

    if size == "4":
        assert (parse("4"), parse("4GB"), parse("1.5 mb"), parse("2k")) == (4, 4 * 10**9, 1_500_000, 2000)
        return
    with pytest.raises(SystemExit):
        main(["convert", str(MICRO), "--output", str(tmp_path / "out"), f"--shard-size={size}"])
    assert "expected a size such as" in capsys.readouterr().err
