# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import MICRO
from vllm_w4a4_plugin.checkpoint import CheckpointError, QuantDescription, QuantType, load_description
from vllm_w4a4_plugin.checkpoint.types import known_types

ENTRY = {"model.layers.0.mlp.up_proj.weight": "FLOAT"}


def test_reads_what_the_real_tool_wrote() -> None:
    description = load_description(MICRO)
    assert description.version == "1.0.0"
    assert description.group_size == 0
    assert description.kv_quant_type is None
    assert description.tensors["model.layers.0.self_attn.q_proj.weight"] == QuantType.W4A4_FLATQUANT_DYNAMIC
    assert description.tensors["model.layers.0.self_attn.o_proj.weight"] == QuantType.W8A8_DYNAMIC
    assert description.tensors["model.layers.1.mlp.down_proj.weight"] == QuantType.FLOAT
    assert len(description.modules) == 2 * 11 + 3


def test_accepts_the_file_itself() -> None:
    assert load_description(MICRO / "quant_model_description.json") == load_description(MICRO)


def test_keys_of_other_producers_are_kept() -> None:
    description = QuantDescription.parse({**ENTRY, "metadata": {}, "optional": {"a": 1}, "is_new": [1]})
    assert description.optional == {"a": 1}
    assert description.model_dump()["is_new"] == [1]


def test_types_that_are_not_known_yet_do_not_break_reading() -> None:
    parsed = QuantDescription.parse({**ENTRY, "visual.blocks.0.weight": "W2A2_NEW"})
    assert parsed.tensors["visual.blocks.0.weight"] == "W2A2_NEW"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({**ENTRY, "a.b.weight": 4}, ["a.b.weight", "must be a string", "found 4"]),
        ({**ENTRY, "group_size": "many"}, ["group_size", "found 'many'"]),
        ({**ENTRY, "model_quant_type": ["W4A4"]}, ["model_quant_type", "found ['W4A4']"]),
        ({"version": "1.0.0"}, ["describes no tensor"]),
    ],
)
def test_bad_values_are_named(data: dict[str, object], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        QuantDescription.parse(data, "here.json")
    assert all(word in str(caught.value) for word in [*words, "here.json"])


def test_missing_file_says_where_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quant_model_description.json: not found.*config.json"):
        load_description(tmp_path)


@pytest.mark.parametrize(
    ("text", "word"), [("{", "not valid JSON"), ("[]", "expected a JSON object"), ("\xff", "JSON")]
)
def test_broken_files_are_errors_of_ours(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "quant_model_description.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=word):
        load_description(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=8))
def test_any_json_object_parses_or_is_refused_clearly(data: dict[str, object]) -> None:
    data = json.loads(json.dumps(data))
    try:
        description = QuantDescription.parse(data)
    except CheckpointError:
        return
    assert description.tensors == {key: value for key, value in data.items() if "." in key}


@given(
    st.dictionaries(st.from_regex(r"[a-z]{1,5}\.[a-z]{1,5}\.weight", fullmatch=True), st.sampled_from(known_types()))
)
def test_renaming_keeps_types(tensors: dict[str, QuantType]) -> None:
    description = QuantDescription(tensors={name: kind.value for name, kind in tensors.items()})
    renamed = description.renamed(lambda names: {f"x.{name}": kind for name, kind in names.items()})
    assert renamed.tensors == {f"x.{name}": kind for name, kind in tensors.items()}
    assert renamed.modules.keys() == {f"x.{name.removesuffix('.weight')}" for name in tensors}
