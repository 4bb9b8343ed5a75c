# SPDX-License-Identifier: Apache-2.0
"""A whole model whose weights are loaded again in place, as trainers do it, and what is left of it if that fails."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.inplace import reload_weights

from tests.cases import write_case
from tests.conftest import MICRO, WEIGHTS, swapped_layers
from tests.loading import engine_config, loaded_model
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.quantization.head import RotatedHeadMethod

Q = "model.layers.0.self_attn.q_proj"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(directory)
    return {name: reader.load(name) for name in reader.tensors}


def results(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the linear layers compute, whatever form their weights are in, and all other parameters."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            x = torch.randn(3, module.input_size, generator=torch.Generator().manual_seed(0)).bfloat16()
            found[name] = module(x)[0]
        else:
            found |= {f"{name}.{key}": p.data.clone() for key, p in module.named_parameters(recurse=False)}
    return found


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def other(micro_copy: Path, edit_tensors: Callable[..., None]) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors that differ from MICRO's in weights, transforms, clips and, in one layer, offsets."""
    changed = swapped_layers()
    changed[f"{Q}.weight_offset"] = torch.full_like(changed[f"{Q}.weight_offset"], 0.5)
    edit_tensors(changed)
    return tensors(micro_copy)


@pytest.mark.feature("weights loaded in place, also in portions, by a trainer")
def test_a_trainer_loads_in_place_any_number_of_times(other: dict[str, torch.Tensor], micro_copy: Path) -> None:
    with loaded_model(micro_copy) as model:
        expected_other = results(model)
    with loaded_model(MICRO) as model:
        expected = results(model)
        for weights, wanted in ((other, expected_other), (tensors(MICRO), expected), (other, expected_other)):
            model.load_weights(iter(weights.items()))
            assert same(results(model), wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_an_int8_head_follows_its_weights(
    tied: bool, micro_copy: Path, edit_json: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_W4A4_HEAD", "int8")
    edit_json("config.json", {"tie_word_embeddings": tied})
    source = "model.embed_tokens.weight" if tied else "lm_head.weight"
    first, x = tensors(micro_copy), torch.randn(3, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    if tied:
        first["lm_head.weight"] = first[source].clone()
        save_file(first, micro_copy / WEIGHTS)
    second = {**first, source: first[source].flip(0).contiguous()}
    if tied:
        second["lm_head.weight"] = second[source].clone()
    with loaded_model(micro_copy) as model:
        assert type(model.lm_head.quant_method) is RotatedHeadMethod
        for weights in (first, second, first):
            model.load_weights(iter(weights.items()))
            found = model.lm_head.quant_method.apply(model.lm_head, x)
            expected = x.float() @ weights[source].float().T
            assert (found.float() - expected).norm() < 0.02 * expected.norm()


def test_portions_that_end_inside_a_fused_layer(other: dict[str, torch.Tensor], micro_copy: Path) -> None:
    """Between the portions the model refuses to run: half of a layer is new."""
    first = {name: tensor for name, tensor in other.items() if "k_proj" not in name}
    second = {name: tensor for name, tensor in other.items() if "k_proj" in name}
    with loaded_model(micro_copy) as model:
        expected = results(model)
    with loaded_model(MICRO) as model:
        model.load_weights(iter(first.items()))
        with pytest.raises(
            CheckpointError, match=r"no complete weights: 12 of \d+ tensors have still to be loaded, e\.g\. .*k_proj"
        ):
            model(torch.tensor([1]), torch.tensor([0]))
        model.load_weights(iter(second.items()))
        assert same(results(model), expected)


def test_a_load_that_fails_leaves_no_model_in_service(other: dict[str, torch.Tensor]) -> None:
    bad = {**other, f"{Q}.clip_ratio": torch.tensor([1.5])}
    with loaded_model(MICRO) as model:
        with pytest.raises(CheckpointError, match=r"q_proj\.clip_ratio: expected a clip ratio in \(0, 1\]"):
            model.load_weights(iter(bad.items()))
        with pytest.raises(CheckpointError, match="no complete weights: the last load of weights failed"):
            model(torch.tensor([1]), torch.tensor([0]))


def test_a_tensor_that_the_model_drops_is_named(other: dict[str, torch.Tensor]) -> None:
    """vLLM's model loader drops a bias that the model has no parameter for."""
    extra = {**other, "model.layers.1.mlp.down_proj.bias": torch.ones(192)}
    with (
        loaded_model(MICRO) as model,
        pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.bias was of no use"),
    ):
        model.load_weights(iter(extra.items()))


def test_biases_of_norms_are_loaded_again(tmp_path: Path) -> None:
    write_case("a1_normbias", tmp_path)
    weights = tensors(tmp_path)
    name = "model.layers.1.input_layernorm.bias"
    with loaded_model(tmp_path) as model:
        norm = model.model.layers[1].input_layernorm
        assert torch.equal(norm.bias.float(), weights[name].to(norm.bias).float())
        model.load_weights(iter({**weights, name: weights[name] + 1}.items()))
        assert torch.equal(norm.bias.float(), (weights[name] + 1).to(norm.bias).float())


def test_a_norm_that_got_no_bias_cannot_get_one_later(tmp_path: Path) -> None:
    write_case("a2_normbias_zero", tmp_path)
    weights = tensors(tmp_path)
    name = "model.layers.1.input_layernorm.bias"
    with loaded_model(tmp_path) as model:
        assert getattr(model.model.layers[1].input_layernorm, "bias", None) is None
        model.load_weights(iter(weights.items()))
        with pytest.raises(CheckpointError, match=f"tensor {name}: the norm's bias was all zero"):
            model.load_weights(iter({**weights, name: weights[name] + 1}.items()))


MISSING = (f"{Q}.clip_ratio", "model.norm.weight", "model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize("missing", MISSING)
def test_vllms_reload_must_be_complete(micro_copy: Path, edit_tensors: Callable[..., None], missing: str) -> None:
    """Files in which a tensor is missing: an error once they are read."""
    edit_tensors(remove=(missing,))
    config = engine_config(MICRO)
    with loaded_model(MICRO) as model:
        with pytest.raises(CheckpointError, match=f"tensor {missing}: loaded before"), set_current_vllm_config(config):
            reload_weights(config, model, None, str(micro_copy), True)
        with pytest.raises(CheckpointError, match="no complete weights"):
            model(torch.tensor([1]), torch.tensor([0]))


@pytest.mark.feature("weights sent tensor by tensor by vLLM's weight transfer")
def test_vllms_weight_transfer(other: dict[str, torch.Tensor], micro_copy: Path) -> None:
    """What vLLM's engines for it do, of which none runs on CPUs: open a reload, load each tensor, close it."""
    with loaded_model(micro_copy) as model:
        expected_other = results(model)
    config = engine_config(MICRO)
    with loaded_model(MICRO) as model:
        expected = results(model)
        for weights, wanted in ((other, expected_other), (tensors(MICRO), expected), (other, expected_other)):
            initialize_layerwise_reload(model)
            for pair in weights.items():
                model.load_weights([pair])
            finalize_layerwise_reload(model, config.model_config)
            assert same(results(model), wanted)


@pytest.mark.parametrize("missing", MISSING)
def test_a_weight_transfer_must_be_complete(other: dict[str, torch.Tensor], missing: str) -> None:
    """Else the model refuses to run until one is."""
    with loaded_model(MICRO) as model:
        initialize_layerwise_reload(model)
        for name, tensor in other.items():
            if name != missing:
                model.load_weights([(name, tensor)])
        message = rf"no complete weights: 1 of \d+ tensors have still to be loaded, e\.g\. {missing}"
        with pytest.raises(CheckpointError, match=message):
            model(torch.tensor([1]), torch.tensor([0]))
        model.load_weights([(missing, other[missing])])
        finalize_layerwise_reload(model, engine_config(MICRO).model_config)
        results(model)
