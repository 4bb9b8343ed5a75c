# SPDX-License-Identifier: Apache-2.0
"""W4A8 layers as msModelSlim stores them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_w4a4_plugin.calibration.run.packing import pack_parts, scale_bias
from vllm_w4a4_plugin.checkpoint import QuantType

A8, W8A8 = QuantType.W4A8_DYNAMIC, QuantType.W8A8_DYNAMIC


def part(file: Path, module: str, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    tensors = {
        f"{module}.weight": torch.randint(-8, 8, (rows, 32), dtype=torch.int8, generator=generator),
        f"{module}.weight_scale": torch.rand(rows, 1, generator=generator),
        f"{module}.weight_offset": torch.zeros(rows, 1),
    }
    save_file(tensors, file)
    return tensors


def test_pairs_of_rows_and_biases(tmp_path: Path) -> None:
    names = ["a.q_proj", "b.down_proj", "c.o_proj"]
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    stored = [part(file, name, 6) for file, name in zip(files, names, strict=True)]
    types = {name: W8A8 if name.startswith("c.") else A8 for tensors in stored for name in tensors}
    parts, packed_types = pack_parts(files, types)
    assert parts[2] == files[2]
    assert [name for name in packed_types if name not in types] == ["a.q_proj.scale_bias", "b.down_proj.scale_bias"]
    for file, name, before, parts_of_input in zip(parts[:2], names, stored, (1, 16), strict=False):
        after, codes = load_file(file), before[f"{name}.weight"]
        packed = after[f"{name}.weight"].int()
        assert packed.shape == (3, 32)
        for row in range(6):
            nibble = (packed[row // 2] >> (4 * (row % 2))) & 15
            assert torch.equal((nibble ^ 8) - 8, codes[row].int())
        weight = codes * before[f"{name}.weight_scale"]
        bias = after[f"{name}.scale_bias"]
        assert bias.shape == (6, parts_of_input)
        torch.testing.assert_close(bias.sum(1), 8 * weight.sum(1))
        if parts_of_input > 1:
            torch.testing.assert_close(bias[:, 1], 8 * weight[:, 2:4].sum(1))


def test_what_cannot_be_paired_or_divided(tmp_path: Path) -> None:
    file = tmp_path / "0.safetensors"
    tensors = part(file, "a.o_proj", 5)
    parts, _ = pack_parts([file], dict.fromkeys(tensors, A8))
    assert torch.equal(load_file(parts[0])["a.o_proj.weight"], tensors["a.o_proj.weight"])
    assert scale_bias(torch.ones(2, 24), "a.o_proj").tolist() == [[192.0], [192.0]]


def test_other_checkpoints_stay_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "0.safetensors"
    types = dict.fromkeys(part(file, "a.o_proj", 4), W8A8)
    assert pack_parts([file], types) == ([file], types)
    assert list(tmp_path.iterdir()) == [file]
