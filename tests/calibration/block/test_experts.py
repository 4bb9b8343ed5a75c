# SPDX-License-Identifier: Apache-2.0
"""Quantization of experts: what all of them share, what calibration gains, and experts that see few tokens or none."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.calibration.running import bytes_of, job, quantize
from tests.families import fake_quantized_model, logits, relative_error, write_model
from vllm_w4a4_plugin.calibration.block import experts as experts_module
from vllm_w4a4_plugin.calibration.block.experts import ExpertsQuantizer
from vllm_w4a4_plugin.calibration.block.forward import RoutedInput
from vllm_w4a4_plugin.calibration.block.plan import BlockPlan
from vllm_w4a4_plugin.calibration.devices import DevicePool
from vllm_w4a4_plugin.calibration.distill import training
from vllm_w4a4_plugin.calibration.model.block import LoadedBlock
from vllm_w4a4_plugin.calibration.model.streamed import StreamedModel
from vllm_w4a4_plugin.calibration.recipe import load_recipe
from vllm_w4a4_plugin.calibration.run.pipeline import Quantization
from vllm_w4a4_plugin.calibration.run.start_from import StartingPoint
from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.verify import header_findings, value_findings

EXPERTS, HIDDEN = 4, 128
FLATQUANT, W4A4, W8A8 = (QuantType(f"{kind}_DYNAMIC") for kind in ("W4A4_FLATQUANT", "W4A4", "W8A8"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    return StreamedModel(write_model("qwen3_moe", tmp_path_factory.mktemp("model") / "float"))


def inputs(tokens: int, spread: float = 1.0, chosen: tuple[int, ...] = tuple(range(EXPERTS))) -> RoutedInput:
    """Tokens in which some channels are larger, and two of the chosen experts for each."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    x *= 1 + spread * torch.rand(HIDDEN, generator=generator) ** 8 * 20
    picked = torch.rand(tokens, len(chosen), generator=generator).topk(2).indices
    weights = torch.rand(tokens, 2, generator=generator)
    return RoutedInput(x, torch.tensor(chosen)[picked], weights)


def quantized(
    model: StreamedModel, routed: RoutedInput, kind: QuantType, statistics: int, held_out: int = 1, plain: bool = False
) -> tuple[LoadedBlock, torch.Tensor, object]:
    """The float block, the experts' output, and the result."""
    block = LoadedBlock(model, 0)
    (experts,) = block.experts
    plan = BlockPlan({}, held_out=held_out, plain=plain, experts={experts.name: kind})
    output = torch.zeros(len(routed.x), HIDDEN)
    devices = DevicePool([torch.device("cpu")])
    result = ExpertsQuantizer(block, experts, routed, statistics, plan, devices, output).run()
    return block, output, result


def exact(block: LoadedBlock, routed: RoutedInput) -> torch.Tensor:
    with torch.no_grad():
        return block.module.get_submodule("mlp.experts")(routed.x, routed.ids, routed.weights)


@pytest.mark.parametrize("kind", [FLATQUANT, W4A4])
def test_calibration_helps_on_tokens_that_it_has_not_seen(model: StreamedModel, kind: QuantType) -> None:
    routed, errors = inputs(3000), {}
    for plain in (True, False):
        block, output, _ = quantized(model, routed, kind, 2500, plain=plain)
        errors[plain] = (output[2500:] - exact(block, routed)[2500:]).norm() / exact(block, routed)[2500:].norm()
    assert errors[False] < (0.7 if kind is FLATQUANT else 0.97) * errors[True]


def test_gate_and_up_of_all_experts_have_one_transform(model: StreamedModel) -> None:
    block, _, result = quantized(model, inputs(1000), FLATQUANT, 800)
    (experts,) = block.experts
    shared = [result.linears[name].tensors for name in experts.gate_and_up]
    for suffix in ("left_trans", "right_trans", "clip_ratio"):
        assert all(torch.equal(tensors[suffix], shared[0][suffix]) for tensors in shared)
    downs = [result.linears[experts.linears(expert)[2]].tensors for expert in range(EXPERTS)]
    assert not torch.equal(downs[0]["left_trans"], downs[1]["left_trans"])
    assert result.rounded == [[], []]
    assert result.unreached == []


def test_experts_without_tokens_are_rounded_plainly_and_named(model: StreamedModel) -> None:
    block, _, result = quantized(model, inputs(1000, chosen=(0, 1, 3)), FLATQUANT, 800)
    assert result.unreached == [2]
    assert 2 not in result.rounded[0] + result.rounded[1]
    (experts,) = block.experts
    down = result.linears[experts.linears(2)[2]].tensors
    weight = block.linear(experts.linears(2)[2]).weight
    scale = weight.abs().amax(1, keepdim=True) / 7
    assert torch.equal(down["weight"].float(), (weight / scale).round())
    assert torch.equal(down["left_trans"], torch.eye(8))
    assert down["clip_ratio"].item() == 1
    # Gate and up are in the basis of the common transform.
    gate = result.linears[experts.linears(2)[0]].tensors
    transform = torch.kron(gate["left_trans"], gate["right_trans"])
    found = gate["weight"].float() * gate["weight_scale"] @ transform.T
    wanted = block.linear(experts.linears(2)[0]).weight
    assert ((found - wanted).norm() / wanted.norm()) < 0.2


@pytest.mark.parametrize("tokens", [5, 60])
def test_an_expert_with_few_tokens_is_rounded_for_others_too(
    model: StreamedModel, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed = inputs(1000, chosen=(0, 1, 3))
    routed.ids[:tokens, 0] = 2
    others, errors = routed.x[tokens:], {}
    for prior in (experts_module.PRIOR_TOKENS, 1e-3):
        monkeypatch.setattr(experts_module, "PRIOR_TOKENS", prior)
        block, _, result = quantized(model, routed, FLATQUANT, 1000, held_out=0)
        name = block.experts[0].linears(2)[0]
        gate = result.linears[name].tensors
        t = others @ torch.kron(gate["left_trans"], gate["right_trans"])
        scale = gate["clip_ratio"] * t.abs().amax(1, keepdim=True) / 7
        t = (t / scale).round().clamp(-8, 7) * scale
        found = t @ (gate["weight"].float() * gate["weight_scale"]).T
        wanted = others @ block.linear(name).weight.T
        errors[prior] = ((found - wanted).norm() / wanted.norm()).item()
    with_prior, without = errors.values()
    print(tokens, errors)
    assert with_prior < 0.95 * without


def test_a_transform_that_does_not_help_is_left_out(model: StreamedModel) -> None:
    """Statistics from tokens that are nothing like the held-out ones."""
    routed = inputs(1000, spread=0.0)
    routed.x[:800] *= torch.logspace(-3, 3, HIDDEN)
    block, _, result = quantized(model, routed, FLATQUANT, 800)
    (experts,) = block.experts
    gate = result.linears[experts.linears(0)[0]].tensors
    assert torch.equal(gate["right_trans"], torch.eye(16))
    assert result.rounded[0] == list(range(EXPERTS))
    assert result.found.mean(0) == result.plain.mean(0)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("kind", [W4A4, W8A8, QuantType.FLOAT])
def test_other_types_of_experts(family: str, kind: QuantType, tmp_path: Path) -> None:
    source, ids = write_model(family, tmp_path / "float"), calibration_ids()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'base: tutorial\nlayers:\n  "*.experts.*": {kind}\n')
    output = quantize(source, tmp_path / "out", ids, load_recipe(str(recipe)))
    reader = CheckpointReader(output)
    assert [*header_findings(reader), *value_findings(reader)] == []
    found = {t for name, t in reader.description.tensors.items() if ".experts." in name}
    assert found == {kind}
    model, _ = fake_quantized_model(source, output)
    exact = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    assert relative_error(logits(model, ids[:2]), logits(exact, ids[:2])) < 0.5


def test_the_run_names_experts_that_the_text_does_not_reach(tmp_path: Path) -> None:
    source = write_model("qwen3_moe", tmp_path / "float", num_experts=64)
    outcome = Quantization(job(source, torch.full((8, 16), 7) + torch.arange(16), "tutorial"), tmp_path / "out").run()
    warning = next(text for text in outcome.warnings if "no token of the calibration text" in text)
    assert "model.layers.0.mlp.experts: " in warning
    layer = next(layer for layer in outcome.layers if layer.name == "model.layers.0.mlp.experts.*.down_proj")
    assert 32 <= len(layer.unreached) < 64
    assert f"model.layers.0.mlp.experts: {', '.join(map(str, layer.unreached))}" in warning


def test_files_with_all_experts_in_one_tensor(tmp_path: Path) -> None:
    """The result is that of the same model with each expert's matrices in tensors of their own."""
    source, ids = write_model("qwen3_moe", tmp_path / "float"), calibration_ids()
    usual = quantize(source, tmp_path / "usual", ids)
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.{expert}.{leaf}_proj.weight") for expert in range(EXPERTS)])
            for leaf in ("gate", "up", "down")
        )
        tensors[f"{prefix}.gate_up_proj"], tensors[f"{prefix}.down_proj"] = torch.cat([gate, up], 1), down
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    fused = quantize(source, tmp_path / "fused", ids)
    readers = [CheckpointReader(directory) for directory in (usual, fused)]
    assert set(readers[0].tensors) == set(readers[1].tensors)
    assert all(torch.equal(readers[0].load(name), readers[1].load(name)) for name in readers[0].tensors)
    kept = quantize(source, tmp_path / "kept", ids, load_recipe("tutorial", ["*.experts.*"]))
    assert torch.equal(CheckpointReader(kept).load(f"{prefix}.down_proj"), down)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_distillation_from_a_checkpoint_is_that_of_one_run(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_mean_divergence", lambda *_: None)  # keep the result, whether it helps or not
    source, ids = write_model(family, tmp_path / "float"), calibration_ids()
    whole = quantize(source, tmp_path / "whole", ids, "all-w4a4", distill=2)
    start = quantize(source, tmp_path / "start", ids, "all-w4a4")
    plain = job(source, ids, distill=2)
    started = replace(plain, start_from=StartingPoint(plain.model, CheckpointReader(start)))
    outcome = Quantization(started, tmp_path / "out").run()
    assert bytes_of(tmp_path / "out") == bytes_of(whole) != bytes_of(start)
    names = [layer.name.removeprefix("model.layers.0.") for layer in outcome.records[0].layers()]
    leaves = ("gate_proj", "up_proj", "down_proj") if family == "qwen2_moe" else ("w1", "w3", "w2")
    module = "mlp" if family == "qwen2_moe" else "block_sparse_moe"
    assert [name for name in names if ".experts." in name] == [f"{module}.experts.*.{leaf}" for leaf in leaves]
    floats = {layer.name: layer.nbytes for layer in outcome.layers if layer.quant_type == "FLOAT"}
    assert floats["model.layers.0.mlp.gate"] == 2 * EXPERTS * HIDDEN
    assert "mlp.gate" in " ".join(outcome.warnings)
    experts = next(n for n in CheckpointReader(whole).tensors if ".experts.1." in n and n.endswith("weight_scale"))
    assert not torch.equal(CheckpointReader(whole).load(experts), CheckpointReader(start).load(experts))


def test_devices_and_files_change_nothing(tmp_path: Path) -> None:
    source, ids = write_model("qwen2_moe", tmp_path / "float"), calibration_ids()
    usual = quantize(source, tmp_path / "usual", ids, gradients=True)
    devices = DevicePool.parse("cpu,cpu")
    run = Quantization(job(source, ids, gradients=True), tmp_path / "other", devices=devices, activations_on_disk=True)
    run.run()
    assert bytes_of(tmp_path / "other") == bytes_of(usual)


def calibration_ids() -> torch.Tensor:
    return torch.randint(3, 512, (12, 64), generator=torch.Generator().manual_seed(5))
