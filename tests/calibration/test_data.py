# SPDX-License-Identifier: Apache-2.0
"""Calibration files of every kind, good and bad, and recipes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer
from vllm_w4a4_plugin.calibration.structure import Group, Role

from tests.conftest import MICRO
from vllm_w4a4_plugin.calibration.data import read_texts, token_rows
from vllm_w4a4_plugin.calibration.errors import CalibrationError
from vllm_w4a4_plugin.calibration.recipe import RECIPES, load_recipe
from vllm_w4a4_plugin.checkpoint import QuantType

GROUPS = {
    Role.QKV: Group(Role.QKV, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Role.O: Group(Role.O, ("self_attn.o_proj",)),
    Role.GATE_UP: Group(Role.GATE_UP, ("mlp.gate_proj", "mlp.up_proj")),
    Role.DOWN: Group(Role.DOWN, ("mlp.down_proj",)),
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", json.dumps(["one", "two"])),
        ("t.jsonl", '{"text": "one"}\n\n{"inputs_pretokenized": "two", "text": "not this"}\n'),
    ],
)
def test_texts(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_texts(tmp_path / name) == ["one", "two"]


def test_plain_text_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n\ntwo")
    assert read_texts(tmp_path / "t.txt") == ["one\n\ntwo"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", b"[", "not valid JSON"),
        ("t.json", b'{"a": 1}', "array of strings"),
        ("t.json", b'["a", 1]', "array of strings"),
        ("t.json", b'["", " "]', "holds no text"),
        ("t.jsonl", b'{"text": "a"}\n{', "t.jsonl:2: not valid JSON"),
        ("t.jsonl", b'{"title": "a"}', "t.jsonl:1: expected an object"),
        ("t.csv", b"a", r"ending in \.json, \.jsonl, \.txt"),
        ("t.txt", b"\xff\xfe", "UTF-8"),
        ("t.txt", None, "cannot be read"),
    ],
)
def test_bad_files(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_texts(tmp_path / name)


def test_token_rows_waste_almost_nothing_and_respect_the_limit() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    text = "The quick brown fox jumps over the lazy dog. " * 80
    total = len(tokenizer(text, add_special_tokens=False).input_ids)
    rows = token_rows([text], tokenizer, 300, 10**6, "t")
    assert rows.shape[1] <= 300
    assert total - rows.numel() < len(rows)
    assert token_rows([text], tokenizer, 300, 700, "t").numel() <= 700
    with pytest.raises(CalibrationError, match="too few"):
        token_rows(["short"], tokenizer, 300, 700, "t")


def test_keep_float_and_yaml(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text('base: all-w4a4\nlayers:\n  "*.down_proj": W8A8_DYNAMIC\n  "model.layers.1.mlp.down_proj": FLOAT\n')
    recipe = load_recipe(str(file), ["model.layers.0.self_attn.*"])
    first, second = (recipe.of_block(f"model.layers.{i}", GROUPS) for i in (0, 1))
    four, eight, kept = QuantType.W4A4_FLATQUANT_DYNAMIC, QuantType.W8A8_DYNAMIC, QuantType.FLOAT
    assert first == {Role.QKV: kept, Role.O: kept, Role.GATE_UP: four, Role.DOWN: eight}
    assert second == {Role.QKV: four, Role.O: four, Role.GATE_UP: four, Role.DOWN: kept}


def test_groups_must_stay_together() -> None:
    with pytest.raises(CalibrationError, match="one matrix product"):
        load_recipe("tutorial", ["*.q_proj"]).of_block("model.layers.0", GROUPS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("layers: [", "as YAML"),
        ("base: best", "unknown base"),
        ("layers: {'*': INT3}", "quant type must be one of"),
        ("layers: {'*': W4A4_DYNAMIC}", "quant type must be one of"),
        ("rules: {}", "keys base and layers"),
    ],
)
def test_bad_recipes(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load_recipe(str(tmp_path / "r.yaml"))


def test_unknown_names() -> None:
    with pytest.raises(CalibrationError, match=", ".join(RECIPES)):
        load_recipe("w3a3")
    with pytest.raises(CalibrationError, match="matches no linear layer"):
        load_recipe("tutorial", ["*.qproj"]).check_patterns(["model.layers.0.self_attn.q_proj"])


@pytest.mark.parametrize(
    ("hidden", "mlp", "head", "recipe", "expected"),
    [
        (576, 1536, 64, "all-w4a4", []),  # 24 x 24, 9 heads of 64, 32 x 48
        (640, 1716, 80, "tutorial", []),  # the tool's 20 x 32 and nothing of width 1716
        (640, 1716, 80, "all-w4a4", ["down: 1716 inputs"]),  # 4 * 3 * 11 * 13 has no factor 8
        (660, 1536, 66, "all-w4a4", ["qkv: 660 inputs", "o: 660 inputs", "gate_up: 660 inputs"]),
    ],
)
def test_sizes_that_npus_refuse_are_named(hidden: int, mlp: int, head: int, recipe: str, expected: list[str]) -> None:
    config = SimpleNamespace(
        hidden_size=hidden,
        intermediate_size=mlp,
        head_dim=head,
        num_attention_heads=hidden // head,
        num_key_value_heads=hidden // head,
    )
    found = load_recipe(recipe).npu_objections(config)
    assert [line.partition(" have")[0] for line in found] == expected
