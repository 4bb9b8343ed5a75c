# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the FlatQuant repository, against its forward pass written out here from its description."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from tests.fuzz.answers import findings
from vllm_w4a4_plugin.calibration.flatquant_repository import convert_matrices
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.cli import main
from vllm_w4a4_plugin.ops import reference

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 128, 192, 4, 2, 32, 2
Matrices = dict[int, dict[str, Tensor]]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(size: int, seed: int) -> Tensor:
    """Well conditioned, not orthogonal."""
    return torch.linalg.qr(random(size, size, seed=seed))[0] * (0.7 + 0.6 * torch.rand(size))


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("float")
    config = Qwen2Config(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"], dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    for number, name in enumerate(tensors):
        if name.endswith("bias") or "norm" in name:
            tensors[name] = random(*tensors[name].shape, seed=number) * 0.1 + ("norm" in name)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    return directory


@pytest.fixture(scope="module")
def matrices() -> Matrices:
    """What the repository's `save_flat_matrices` writes."""
    result: Matrices = {}
    for layer in range(LAYERS):
        found: dict[str, Tensor] = {}
        for number, (name, left, right) in enumerate(
            (("self_attn.ln_trans", 8, 16), ("mlp.up_gate_trans", 8, 16), ("mlp.down_trans", 12, 16))
        ):
            seed = 10 * layer + number
            found[f"{name}.matrix_left"], found[f"{name}.matrix_right"] = matrix(left, seed), matrix(right, seed + 100)
            found[f"{name}.matrix_left_inv"] = torch.linalg.inv(found[f"{name}.matrix_left"]).T
            found[f"{name}.matrix_right_inv"] = torch.linalg.inv(found[f"{name}.matrix_right"]).T
            found[f"{name}.diag_scale"] = 0.5 + torch.rand(left * right)
        for number, (name, size) in enumerate(
            (("o_trans", HEADS), ("vcache_trans", HEAD_DIM), ("kcache_trans", HEAD_DIM))
        ):
            found[f"self_attn.{name}.matrix"] = matrix(size, 50 + 10 * layer + number)
            found[f"self_attn.{name}.matrix_inv_t"] = torch.linalg.inv(found[f"self_attn.{name}.matrix"]).T
        for name, rows in sizes().items():
            for end in ("max", "min"):
                found[f"{name}.clip_factor_w_{end}"] = 2 + random(rows, 1, seed=rows).abs()
                group = {"q": 2.5, "k": 2.5, "v": 2.5, "o": 3.0, "g": 1.5, "u": 1.5, "d": 2.0}[name.split(".")[1][0]]
                found[f"{name}.act_quantizer.clip_factor_a_{end}"] = torch.tensor([group])
        result[layer] = found
    return result


def sizes() -> dict[str, int]:
    return {
        "self_attn.q_proj": HIDDEN, "self_attn.k_proj": KV_HEADS * HEAD_DIM, "self_attn.v_proj": KV_HEADS * HEAD_DIM,
        "self_attn.o_proj": HIDDEN, "mlp.gate_proj": INTERMEDIATE, "mlp.up_proj": INTERMEDIATE, "mlp.down_proj": HIDDEN,
    }  # fmt: skip


@pytest.fixture(scope="module")
def converted(float_model: Path, matrices: Matrices, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.save(matrices, folder / "flat_matrices.pth")
    output = folder / "out" / "w4a4"
    assert main(["convert", str(folder), "--float", str(float_model), "--output", str(output)]) == 0
    assert {file.name for file in output.parent.iterdir()} == {"w4a4"}
    return output


def kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return x @ torch.kron(left, right)


def rounded(values: Tensor, high: Tensor) -> Tensor:
    """Symmetric fake quantization to four bits; `high` is the largest magnitude that a row may have."""
    scale = high / 7
    return (values / scale).round().clamp(-8, 7) * scale


def expected_output(name: str, layer: dict[str, Tensor], weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A layer's output as the repository's forward pass computes it before it folds anything, from the layer's input.

    For v it is in the basis of `vcache_trans`, for up without the diagonal scale of down.
    """
    part, leaf = name.split(".")
    if leaf == "o_proj":
        left, right = layer["self_attn.o_trans.matrix"], layer["self_attn.vcache_trans.matrix"]
        diagonal = torch.ones(HIDDEN)
    else:
        trans = {"q": "ln_trans", "k": "ln_trans", "v": "ln_trans", "d": "down_trans"}.get(leaf[0], "up_gate_trans")
        left, right = layer[f"{part}.{trans}.matrix_left"], layer[f"{part}.{trans}.matrix_right"]
        diagonal = layer[f"{part}.{trans}.diag_scale"]
    x = kronecker(x.double() * diagonal, left.double(), right.double())
    weight = kronecker(weight.double() / diagonal, *(torch.linalg.inv(m.double()).T for m in (left, right)))
    low, high = (
        bound * layer[f"{name}.clip_factor_w_{end}"].double().sigmoid()
        for bound, end in ((weight.min(1, keepdim=True)[0], "min"), (weight.max(1, keepdim=True)[0], "max"))
    )
    weight = weight.clamp(low, high)
    if leaf == "v_proj":
        v = layer["self_attn.vcache_trans.matrix"].double()
        weight = (weight.T.reshape(-1, HEAD_DIM) @ v).reshape(HIDDEN, -1).T
        bias = None if bias is None else (bias.double().reshape(-1, HEAD_DIM) @ v).reshape(-1)
    weight = rounded(weight, weight.abs().max(1, keepdim=True)[0])
    clip = layer[f"{name}.act_quantizer.clip_factor_a_max"].double().sigmoid()
    y = rounded(x, clip * x.abs().max(1, keepdim=True)[0]) @ weight.T
    return y if bias is None else y + bias


@pytest.mark.parametrize("name", sizes())
def test_each_layer_computes_what_the_repository_does(
    name: str, float_model: Path, matrices: Matrices, converted: Path
) -> None:
    source, reader = CheckpointReader(float_model), CheckpointReader(converted)
    for number in range(LAYERS):
        prefix, layer = f"model.layers.{number}", matrices[number]
        v = {key.rpartition(".")[2]: reader.load(key) for key in reader.tensors if key.startswith(f"{prefix}.{name}.")}
        features = v["weight"].shape[1]
        x = random(20, features, seed=number)
        bias = source.load(f"{prefix}.{name}.bias") if f"{prefix}.{name}.bias" in source.tensors else None
        expected = expected_output(name, layer, source.load(f"{prefix}.{name}.weight"), bias, x)
        # Diagonal scales are folded into what comes before: norms, or the rows of up.
        part, leaf = name.split(".")
        given = x
        if leaf == "o_proj":
            given = (x.double().reshape(-1, HEAD_DIM) @ layer["self_attn.vcache_trans.matrix"].double()).reshape(20, -1)
        else:
            trans = {"q": "ln_trans", "k": "ln_trans", "v": "ln_trans", "d": "down_trans"}.get(leaf[0], "up_gate_trans")
            given = x * layer[f"{part}.{trans}.diag_scale"]
        if leaf == "up_proj":
            expected = expected * layer["mlp.down_trans.diag_scale"]
        found = reference.flatquant_linear(
            given.float(), v["weight"], v["weight_scale"].squeeze(1), v["left_trans"], v.get("right_trans"),
            v["clip_ratio"].item(), v.get("bias"),
        )  # fmt: skip
        errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert errors.median() < 1e-4, name
        assert errors.max() < 0.1, name  # an activation that is rounded the other way


def test_norms_take_the_diagonal_scales(float_model: Path, matrices: Matrices, converted: Path) -> None:
    source, reader = CheckpointReader(float_model), CheckpointReader(converted)
    for norm, trans in (("input_layernorm", "self_attn.ln_trans"), ("post_attention_layernorm", "mlp.up_gate_trans")):
        name = f"model.layers.1.{norm}.weight"
        expected = source.load(name) * matrices[1][f"{trans}.diag_scale"]
        assert torch.allclose(reader.load(name), expected, rtol=1e-6)


def test_the_result_passes_verify(converted: Path) -> None:
    assert findings(converted) == []
    reader = CheckpointReader(converted)
    assert reader.description.modules["model.layers.0.self_attn.o_proj"] == "W4A4_FLATQUANT_DYNAMIC"
    assert "model.layers.0.self_attn.o_proj.right_trans" not in reader.tensors


def test_clip_factors_that_differ_are_averaged(float_model: Path, matrices: Matrices, tmp_path: Path) -> None:
    changed = {number: dict(layer) for number, layer in matrices.items()}
    changed[1]["self_attn.k_proj.act_quantizer.clip_factor_a_min"] = torch.tensor([1.0])
    torch.save(changed, tmp_path / "flat_matrices.pth")
    merged = convert_matrices(tmp_path / "flat_matrices.pth", float_model, tmp_path / "out")
    mean = (5 * torch.tensor(2.5).sigmoid() + torch.tensor(1.0).sigmoid()) / 6
    stored = CheckpointReader(tmp_path / "out").load("model.layers.1.self_attn.q_proj.clip_ratio")
    assert stored.item() == pytest.approx(mean.item())
    assert merged.deviation == pytest.approx(1 - (torch.tensor(1.0).sigmoid() / mean).item(), rel=1e-5)
    assert merged.layer == "model.layers.1"


class Evil:
    """Runs a command when a pickle of it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("pickle", "cannot be read as tensors"),
        ("bytes", "cannot be read as tensors"),
        ("list", "expected a dictionary of layer numbers"),
        ("layers", "has 1 layers, but .* has tensor model.layers.1"),
        ("no transform", r"layer model.layers.0: self_attn.o_trans.matrix is missing"),
        ("size", r"expected transforms of 192 features, found 12 x 12"),
        ("nothing", "flat_matrices.pth: not found"),
    ],
)
def test_other_files_are_refused(
    content: str, message: str, float_model: Path, matrices: Matrices, tmp_path: Path
) -> None:
    data: object = {number: dict(layer) for number, layer in matrices.items()}
    assert isinstance(data, dict)
    if content == "pickle":
        data[0]["x"] = Evil(tmp_path / "evil")
    elif content == "list":
        data = [1]
    elif content == "layers":
        del data[1]
    elif content == "no transform":
        del data[0]["self_attn.o_trans.matrix"]
    elif content == "size":
        data[0]["mlp.down_trans.matrix_right"] = matrix(12, 0)
    file = tmp_path / "flat_matrices.pth"
    if content == "bytes":
        file.write_bytes(b"PK\x03\x04 no archive")
    elif content != "nothing":
        torch.save(data, file)
    with pytest.raises(CheckpointError, match=message):
        convert_matrices(tmp_path, float_model, tmp_path / "out")
    assert {f.name for f in tmp_path.iterdir()} <= {"flat_matrices.pth"}
