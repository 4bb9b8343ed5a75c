# SPDX-License-Identifier: Apache-2.0
"""A quant type that only this file knows: one table entry and one scheme, and every part of the package takes it."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from tests.conftest import PACKED
from vllm_w4a4_plugin.checkpoint import QuantType, TypeSpec, register_type, types
from vllm_w4a4_plugin.checkpoint.types import BIAS_TENSOR, CPU, WEIGHT, Layout, TensorSpec, quantized_tensors
from vllm_w4a4_plugin.cli import main
from vllm_w4a4_plugin.quantization.config import AscendW4A4Config
from vllm_w4a4_plugin.quantization.parameters.base import MatrixParameter
from vllm_w4a4_plugin.quantization.parameters.shared import PerShardParameter
from vllm_w4a4_plugin.quantization.schemes import Layer, LayerShape, LinearScheme, register_scheme, registry

TOY, GAIN = "W8A16_TOY", "gain"
INPUT_SIZE, OUTPUT_SIZES = 24, (16, 8)


def even(weight: torch.Tensor) -> str:
    return "expected even weights" if bool((weight % 2).any()) else ""


class GainParameter(PerShardParameter):
    """float32 [shards]."""

    def _tensor_shape(self) -> torch.Size:
        return torch.Size([1])

    def _store(self, loaded: torch.Tensor, shard: int) -> None:
        self.data[shard].copy_(loaded.reshape(()))


@pytest.fixture
def toy_type(monkeypatch: pytest.MonkeyPatch) -> QuantType:
    """The type, for one test."""
    for module, table in ((types, "_MEMBERS"), (types, "_SPECS"), (registry, "_SCHEMES")):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    gain = TensorSpec(GAIN, Layout.ONE_VALUE)
    tensors = (*quantized_tensors(even), gain, BIAS_TENSOR)
    kind = register_type(TypeSpec(TOY, 8, 16, tensors, frozenset({CPU})))

    @register_scheme(TOY)
    class ToyScheme(LinearScheme):
        """y = gain * x (weight * weight_scale)^T, in floats."""

        def create_weights(self, layer: Layer, shape: LayerShape, weight_loader: Callable[..., Any]) -> None:
            common = {"plan": self.plan, "weight_loader": weight_loader}
            weight = torch.zeros(shape.sizes, dtype=torch.int8)
            layer.register_parameter(
                WEIGHT, MatrixParameter(weight, sizes=shape.sizes, input_parts=1, suffix=WEIGHT, **common)
            )
            self._register_scales(layer, shape, weight_loader)
            layer.register_parameter(GAIN, GainParameter(torch.zeros(len(self.plan.shards)), suffix=GAIN, **common))

        def process_weights_after_loading(self, layer: Layer) -> None:
            pass

        def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            weight = layer.weight.float() * layer.weight_scale[:, None]
            return layer.gain.repeat_interleave(torch.tensor(OUTPUT_SIZES)) * (x @ weight.t())

        @property
        def operator(self) -> str:
            return "toy product"

        def weight_bytes(self, layer: Layer) -> int:
            return layer.weight.numel()

    return kind


@pytest.fixture
def tensors(toy_type: QuantType, tmp_path: Any) -> dict[str, torch.Tensor]:
    """A checkpoint of one gated MLP's first half in `tmp_path`."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, rows in zip(("gate_proj", "up_proj"), OUTPUT_SIZES, strict=True):
        weight = 2 * torch.randint(-60, 60, (rows, INPUT_SIZE), dtype=torch.int8, generator=generator)
        tensors |= {
            f"m.{name}.weight": weight,
            f"m.{name}.weight_scale": torch.rand(rows, 1, generator=generator),
            f"m.{name}.gain": torch.rand(1, generator=generator),
        }
    write(tmp_path, tensors)
    return tensors


def write(directory: Any, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors")
    (directory / "quant_model_description.json").write_text(json.dumps(dict.fromkeys(tensors, TOY)))
    (directory / "config.json").write_text(json.dumps({"architectures": ["Toy"]}))


def test_verify(tensors: dict[str, torch.Tensor], tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 0
    tensors["m.up_proj.weight"][0, 0] += 1
    write(tmp_path, tensors)
    assert main(["verify", str(tmp_path)]) == 1
    assert "m.up_proj.weight: expected even weights" in capsys.readouterr().out
    del tensors["m.up_proj.gain"]
    write(tmp_path, tensors)
    assert main(["verify", str(tmp_path)]) == 1
    assert "m.up_proj.gain is in none of the weight files, but a W8A16_TOY layer needs it" in capsys.readouterr().out


@pytest.mark.usefixtures("tensors")
def test_inspect(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["gate_proj", TOY, "16", "x", "24", "1", "1"] in rows


@pytest.mark.usefixtures("vllm_context", "at_rank")
def test_loading_and_a_forward_pass(tensors: dict[str, torch.Tensor], tmp_path: Any) -> None:
    config = AscendW4A4Config()
    config.maybe_update_config(str(tmp_path))
    config.packed_modules_mapping = PACKED
    layer = MergedColumnParallelLinear(
        INPUT_SIZE,
        list(OUTPUT_SIZES),
        bias=False,
        params_dtype=torch.float32,
        quant_config=config,
        prefix="m.gate_up_proj",
    )
    for shard, name in enumerate(("gate_proj", "up_proj")):
        for suffix in ("weight", "weight_scale", GAIN):
            parameter = getattr(layer, suffix)
            parameter.weight_loader(parameter, tensors[f"m.{name}.{suffix}"], shard)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, INPUT_SIZE, generator=torch.Generator().manual_seed(1))
    expected = [
        tensors[f"m.{name}.gain"] * (x @ (tensors[f"m.{name}.weight"] * tensors[f"m.{name}.weight_scale"]).t())
        for name in ("gate_proj", "up_proj")
    ]
    torch.testing.assert_close(layer(x)[0], torch.cat(expected, -1))
    assert "toy product" in config.report.table()


def test_entries_and_schemes_do_not_replace_one_another(toy_type: QuantType) -> None:
    with pytest.raises(ValueError, match="registered already"):
        register_type(TypeSpec(TOY, 4, 16))
    with pytest.raises(ValueError, match="does not run on 'npu'"):
        register_scheme(TOY, backend="npu")(LinearScheme)
    with pytest.raises(ValueError, match="has a scheme for 'cpu' already: ToyScheme"):
        register_scheme(TOY)(LinearScheme)
