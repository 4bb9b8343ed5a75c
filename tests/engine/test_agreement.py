# SPDX-License-Identifier: Apache-2.0
"""`verify` and loading give one answer, on checkpoints that were changed at random and on those that once differed.

W4A4_FUZZ=2000 tries so many changed checkpoints in place of a few.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.answers import Answer, findings, load, one_rank, unchecked
from tests.fuzz.contents import CONTENTS
from tests.fuzz.draft import BASES, Draft, base
from tests.fuzz.structure import STRUCTURE

EXAMPLES = int(os.environ.get("W4A4_FUZZ", "60"))
ATTENTION, NORM = "model.layers.0.self_attn", "model.layers.1.input_layernorm"


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    with one_rank():
        yield


def answers(draft: Draft, **arguments: Any) -> tuple[list[str], Answer]:
    """Of `verify` and of loading, after the checks that hold for every checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        draft.write(Path(folder))
        found = findings(Path(folder))
        loading = load(Path(folder), **arguments)
        cannot_know = loading.of_vllm and bool(unchecked(Path(folder)))
    error = "" if loading.error is None else f"{type(loading.error).__name__}: {loading.error}"
    text = f"{draft.log}\nverify: {found[:2] or 'good'}\nloading: {error or 'loads'}"
    assert cannot_know or bool(found) == bool(error), text
    assert not error or loading.is_ours or loading.of_vllm, text
    assert loading.wrong == (), text
    return found, loading


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 100,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_changed_checkpoints(data: st.DataObject) -> None:
    def pick(options: Any) -> Any:
        return data.draw(st.sampled_from(options))

    draft = base(pick(BASES))
    for _ in range(pick((1, 1, 2, 3))):
        pick((*STRUCTURE, *CONTENTS))(draft, pick)
    # Without a description nothing tells vLLM that the plugin is wanted, unless the user does.
    answers(draft, quantization=pick(("ascend", None)) if draft.description is not None else "ascend")


@pytest.mark.parametrize("name", BASES)
def test_the_unchanged_checkpoints_load(name: str) -> None:
    found, loading = answers(base(name))
    assert found == []
    assert loading.error is None


def refused(draft: Draft, *words: str) -> None:
    """Both refuse it, in the same words."""
    found, loading = answers(draft)
    assert all(word in found[0] for word in words), found
    assert all(word in str(loading.error) for word in words), loading.error


def accepted(draft: Draft) -> None:
    found, _ = answers(draft)
    assert found == []


def test_weight_offsets_of_a_type_without_them() -> None:
    draft = base("micro")
    name = f"{ATTENTION}.o_proj.weight_offset"
    draft.put(name, torch.full_like(draft.get(name), 1.5))
    refused(draft, name, "expected zeros")


@pytest.mark.parametrize("groups", [48, 64])
def test_groups_too_small_for_the_kernels(groups: int) -> None:
    draft = base("micro")
    for leaf in ("gate_proj", "up_proj"):
        for suffix in ("weight_scale", "weight_offset"):
            name = f"model.layers.0.mlp.{leaf}.{suffix}"
            draft.put(name, draft.get(name).repeat(1, groups))
    refused(draft, "model.layers.0.mlp.gate_proj", f"group size {192 // groups} is not a multiple of 8")


@pytest.mark.parametrize("name", ["mtp.fc.weight", "model.mtp_block.weight", "model.layers.2.eh_proj.weight"])
def test_layers_for_multi_token_prediction_of_a_model_that_vllm_knows_without(name: str) -> None:
    draft = base("micro")
    draft.config = {**draft.config, "num_nextn_predict_layers": 1}  # type: ignore[dict-item]
    draft.put(name, torch.zeros(4, 4), "FLOAT")
    accepted(draft)


@pytest.mark.parametrize("suffix", ["left_trans", "weight_scale", "inner"])
def test_tensor_of_a_float_module_that_has_no_use_for_it(suffix: str) -> None:
    draft = base("micro")
    draft.put(f"{NORM}.{suffix}", torch.zeros(1), "FLOAT")
    refused(draft, f"{NORM}.{suffix}")


@pytest.mark.parametrize("module", ["x.proj", "model.layers.0.mlp.middle_proj", "model.layers.7.mlp.up_proj"])
def test_module_that_the_model_does_not_have(module: str) -> None:
    draft = base("micro")
    draft.put(f"{module}.weight", torch.zeros(4, 4), "FLOAT")
    refused(draft, f"{module}.weight", "config.json and weights come from different models")


@pytest.mark.parametrize("module", ["model.norm", f"{ATTENTION}.k_norm", "model.layers.1.mlp.experts.2.up_proj"])
def test_module_that_is_missing(module: str) -> None:
    draft = base("c4_moe_mixed")
    draft.drop(f"{module}.weight")
    refused(draft, f"{module}.weight", "the model of config.json has it")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{ATTENTION}.q_norm.weight", [63]),
        (f"{NORM}.weight", [192, 1]),
        ("model.embed_tokens.weight", [1]),
        ("lm_head.weight", [511, 192]),
    ],
)
def test_float_tensor_of_another_shape(name: str, shape: list[int]) -> None:
    draft = base("micro")
    draft.put(name, torch.zeros(shape))
    refused(draft, name, "expected shape", str(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [f"{NORM}.weight", f"{ATTENTION}.k_norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight",
     f"{ATTENTION}.q_proj.bias"],
)  # fmt: skip
def test_float_values_that_are_not_finite(name: str, value: float) -> None:
    draft = base("a3_m4_qkv_bias")
    tensor = draft.get(name).clone()
    tensor.view(-1)[-1] = value
    draft.put(name, tensor)
    refused(draft, name, "expected finite values, found 1 of")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 8}, ("num_attention_heads 4 is not a multiple of num_key_value_heads 8",)),
        ({"num_key_value_heads": 1}, ("k_proj.weight", "expected shape [64, 192]", "found [128, 192]")),
        ({"attention_bias": True}, ("q_proj.bias is in none of the weight files",)),
        ({"num_attention_heads": 0}, ("num_attention_heads must be a positive whole number, found 0",)),
        ({"model_type": "qwen2"}, ("expected model_type qwen3 for Qwen3ForCausalLM, found 'qwen2'",)),
        ({"num_hidden_layers": 1}, ("belongs to layer 1, but the model of config.json has 1",)),
        ({"tie_word_embeddings": True}, ("lm_head.weight differs from model.embed_tokens.weight",)),
    ],
)
def test_config_of_another_model(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    draft = base("micro")
    draft.config = {**draft.config, **changes}  # type: ignore[dict-item]
    refused(draft, *words)


@pytest.mark.parametrize(
    ("kind", "tied", "words"),
    [
        ("W8A8_DYNAMIC", True, ("layer lm_head: quant type W8A8_DYNAMIC, but config.json ties the output head",)),
        ("W8A8_DYNAMIC", False, ()),
        ("W8A16", False, ("layer lm_head: output heads of quant type W8A16 cannot be run here",)),
    ],
)
def test_output_head_in_int8(kind: str, tied: bool, words: tuple[str, ...]) -> None:
    draft = base("micro")
    draft.put("lm_head.weight", torch.ones(512, 192, dtype=torch.int8), kind)
    for suffix, value in (("weight_scale", 0.01), ("weight_offset", 0.0)):
        draft.put(f"lm_head.{suffix}", torch.full((512, 1), value), kind)
    draft.config = {**draft.config, "tie_word_embeddings": tied}  # type: ignore[dict-item]
    refused(draft, *words) if words else accepted(draft)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "192"}, "hidden_size must be a positive whole number, found '192'"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings must be true or false, found None"),
        (
            {"num_hidden_layers": 1, "num_nextn_predict_layers": 1},
            "layer_types has 2 entries, num_hidden_layers is 1",
        ),
    ],
)
def test_config_that_vllm_refuses_by_itself(changes: dict[str, Any], words: str) -> None:
    draft = base("d1_mimo_undesc")
    draft.config = {**draft.config, **changes}  # type: ignore[dict-item]
    found, _ = answers(draft)
    assert words in found[0]


def test_no_config() -> None:
    draft = base("micro")
    draft.config = None
    found, _ = answers(draft)
    assert "config.json: not found" in found[0]


def test_quantized_attention() -> None:
    draft = base("micro")
    draft.description["fa_quant_type"] = "FAKQuant"  # type: ignore[index,call-overload]
    refused(draft, "fa_quant_type is 'FAKQuant'")


def test_factors_that_are_equal_in_another_dtype() -> None:
    draft = base("micro")
    for leaf in ("q_proj", "k_proj", "v_proj"):
        name = f"{ATTENTION}.{leaf}.left_trans"
        draft.put(name, draft.get(name).bfloat16().to(torch.float64 if leaf == "k_proj" else torch.bfloat16))
    accepted(draft)


def test_bias_of_a_module_that_can_have_none() -> None:
    draft = base("c4_moe_mixed")
    draft.put("model.layers.1.mlp.experts.0.up_proj.bias", torch.ones(128), "FLOAT")
    refused(draft, "model.layers.1.mlp.experts.0.up_proj.bias is a bias, and")


def test_an_architecture_that_is_not_known_here_is_said_to_be_unchecked(tmp_path: Path) -> None:
    draft = base("micro")
    draft.config = {**draft.config, "architectures": ["Foo"]}  # type: ignore[dict-item]
    draft.write(tmp_path)
    assert findings(tmp_path) == []
    assert "(Foo) are not known here" in unchecked(tmp_path)[0]


def test_an_error_of_vllms_loading_names_the_tensor() -> None:
    """For architectures that are not in the table; this one is Llama to vLLM."""
    draft = base("micro")
    draft.config = {**draft.config, "architectures": ["LLaMAForCausalLM"], "model_type": "llama"}  # type: ignore[dict-item]
    for norm in [name for name in draft.names() if name.endswith(("q_norm.weight", "k_norm.weight"))]:
        draft.drop(norm)
    name = f"{NORM}.weight"
    draft.put(name, torch.zeros(191))
    with tempfile.TemporaryDirectory() as folder:
        draft.write(Path(folder))
        assert "are not known here" in unchecked(Path(folder))[0]
        loading = load(Path(folder), quantization="ascend")
    assert loading.is_ours
    assert f"tensor {name}, shape [191]: vLLM's " in str(loading.error)
    assert "cannot load this checkpoint" in str(loading.error)
