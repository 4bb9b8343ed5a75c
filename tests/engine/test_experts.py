# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen3-MoE whose experts have every quant type that runs, served and reloaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import DESCRIPTION
from tests.engine.oracle import prompt_logprobs
from tests.engine.test_cases import findings, log_probabilities
from tests.loading import loaded_model
from tests.mixtures import EXPERTS, HIDDEN, KINDS, TOP_K, ReferenceExperts, write, write_mixture
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.ops import api, arena, self_check

FLATQUANT = KINDS.index("W4A4_FLATQUANT_DYNAMIC")
PROMPT = [(7 * i * i + 3 * i) % 256 for i in range(40)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixture")
    write_mixture(directory)
    return directory


def experts_of(model: Any, layer: int) -> Any:
    return model.model.layers[layer].mlp.experts.routed_experts


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights and ids of a batch."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).softmax(-1).topk(TOP_K)
    return x, weights, ids.to(torch.int32)


def errors(model: Any, directory: Path, layer: int, tokens: int) -> torch.Tensor:
    """Relative error of each token's output of one layer of experts."""
    x, weights, ids = routed(tokens)
    found = experts_of(model, layer).forward_modular(x, weights, ids)
    prefix = f"model.layers.{layer}.mlp.experts"
    expected = ReferenceExperts(CheckpointReader(directory), prefix)(x, ids, weights)
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def test_each_layer_computes_what_its_tensors_say(mixture: Path) -> None:
    assert findings(mixture) == []
    with loaded_model(mixture) as model:
        for layer in range(len(KINDS)):
            for tokens in (1, 50):
                error = errors(model, mixture, layer, tokens)
                assert error.median() < 1e-5, KINDS[layer]
                assert error.max() < 0.1, KINDS[layer]  # an activation that is rounded the other way


def test_weights_lie_side_by_side(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an area that huge pages cover (ops/arena.py), not each in memory of its own."""
    monkeypatch.setattr(arena, "_area", None)
    with loaded_model(mixture) as model:
        weights = [getattr(experts_of(model, 1), name) for name in ("w13_weight", "w2_weight")]
        addresses = [weight.data_ptr() for weight in weights]
        begin = addresses[0] // arena.HUGE_PAGE * arena.HUGE_PAGE
        assert all(begin <= address < begin + arena.AREA and address % arena.PAGE == 0 for address in addresses)
        assert all(weight.untyped_storage().nbytes() == weight.numel() for weight in weights)


@pytest.mark.feature("mixtures of experts")
@pytest.mark.engine
def test_the_served_model_is_that_of_the_formula(mixture: Path) -> None:
    difference = (log_probabilities(mixture, PROMPT) - prompt_logprobs(mixture, PROMPT)).abs()
    assert difference.median() < 1e-2


def test_experts_are_reloaded_in_place(mixture: Path, tmp_path: Path) -> None:
    """The other weights are those of the experts in reverse order, with other transforms, clips and offsets."""
    reader = CheckpointReader(mixture)
    tensors = {name: reader.load(name) for name in reader.tensors}
    other = {}
    for name, tensor in tensors.items():
        head, found, rest = name.partition(".experts.")
        number, _, suffix = rest.partition(".")
        other[f"{head}.experts.{EXPERTS - 1 - int(number)}.{suffix}" if found else name] = tensor
    for name in other:
        if name.endswith(("left_trans", "right_trans")):
            other[name] = -other[name].flip(0).contiguous()
        elif name.endswith("clip_ratio"):
            other[name] = other[name] - 0.1
        elif name.endswith("weight_offset") and f"layers.{FLATQUANT}." in name:
            other[name] = torch.full_like(other[name], 0.5)
    write(tmp_path, other, dict(reader.description.tensors))
    (tmp_path / "config.json").write_text((mixture / "config.json").read_text())
    with loaded_model(mixture) as model:
        for weights, directory in ((other, tmp_path), (tensors, mixture)):
            model.load_weights(iter(weights.items()))
            for layer in range(len(KINDS)):
                assert errors(model, directory, layer, 30).median() < 1e-5, KINDS[layer]
        del weights["model.layers.1.mlp.experts.5.up_proj.right_trans"]
        model.load_weights(iter(weights.items()))
        with pytest.raises(CheckpointError, match=r"e\.g\. model\.layers\.1\.mlp\.experts\.5\.up_proj\.right_trans"):
            model(torch.tensor([1]), torch.tensor([0]))


def test_dummy_weights_compute(mixture: Path) -> None:
    with loaded_model(mixture, load_format="dummy") as model:
        for layer in range(len(KINDS)):
            y = experts_of(model, layer).forward_modular(*routed(20))
            assert y.isfinite().all()
            assert 0.01 < y.std() < 1000, KINDS[layer]  # three products of ordinary size


def eight_bits(reader: CheckpointReader, prefix: str, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Experts with unclipped 8-bit activations by the formula, in float64."""

    def linear(x: torch.Tensor, expert: int, leaf: str) -> torch.Tensor:
        name = f"{prefix}.{expert}.{leaf}"
        if f"{name}.left_trans" in reader.tensors:
            x = x @ torch.kron(*(reader.load(f"{name}.{side}_trans").double() for side in ("left", "right")))
        scale = x.abs().amax(-1, keepdim=True) / 127
        weight, weight_scale = (reader.load(f"{name}.{suffix}").double() for suffix in ("weight", "weight_scale"))
        weight_scale = weight_scale.repeat_interleave(weight.shape[1] // weight_scale.shape[1], 1)
        return (x / scale).round() * scale @ (weight * weight_scale).T

    y = torch.zeros(batch[0].shape, dtype=torch.float64)
    for token, (x, weights, ids) in enumerate(zip(*batch, strict=True)):
        for weight, expert in zip(weights.tolist(), ids.tolist(), strict=True):
            gate, up = (linear(x.double()[None], expert, leaf) for leaf in ("gate_proj", "up_proj"))
            y[token] += weight * linear(torch.nn.functional.silu(gate) * up, expert, "down_proj")[0]
    return y


def test_8_bit_activations(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_W4A4_ACTIVATION_BITS", "8")
    reader, batch = CheckpointReader(mixture), routed(20)
    with loaded_model(mixture, dtype="float32") as model:
        for layer in range(len(KINDS)):
            found = experts_of(model, layer).forward_modular(*batch)
            expected = eight_bits(reader, f"model.layers.{layer}.mlp.experts", batch)
            error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert error.median() < 1e-4, KINDS[layer]
            assert error.max() < 0.02, KINDS[layer]
            is_widened = "8-bit activations, not clipped" in experts_of(model, layer).quant_method.scheme.remark
            assert is_widened == KINDS[layer].startswith("W4A4")


def test_kernels_that_compute_wrong_results_end_the_start(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = api.experts_mlp
    monkeypatch.setattr(api, "experts_mlp", lambda x, *others, **more: -kernel(x, *others, **more))
    self_check._require_working_kernels.cache_clear()
    with pytest.raises(RuntimeError, match="The int4 kernels of experts for"), loaded_model(mixture):
        pass
    monkeypatch.setenv("VLLM_W4A4_SELF_CHECK", "0")
    with loaded_model(mixture):
        pass


def test_the_number_of_experts_is_that_of_the_config(mixture: Path, tmp_path: Path) -> None:
    reader = CheckpointReader(mixture)
    write(tmp_path, {name: reader.load(name) for name in reader.tensors}, dict(reader.description.tensors))
    config = json.loads((mixture / "config.json").read_text())
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    (tmp_path / "config.json").write_text(json.dumps({**config, key: EXPERTS + 1}))
    assert any("experts.8.gate_proj.weight is in none of the weight files" in finding for finding in findings(tmp_path))
    assert (tmp_path / DESCRIPTION).exists()
