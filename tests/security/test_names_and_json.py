# SPDX-License-Identifier: Apache-2.0
"""What a stranger's JSON can do: nothing but end in one error that a terminal shows as it is."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DESCRIPTION, INDEX, MICRO, WEIGHTS
from vllm_w4a4_plugin.calibration.errors import CalibrationError
from vllm_w4a4_plugin.calibration.recipe import load_recipe
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.checkpoint import description as description_module
from vllm_w4a4_plugin.checkpoint.description import MAX_JSON_DEPTH, read_json_object
from vllm_w4a4_plugin.cli import main

HOSTILE = ["\x1b[2J\x1b[1;1H", "good\nFAKE LINE: good", "\u202egnp.exe", "\ud800", "\x07", "\x9b31m", "a\rb"]
"""Clears a screen; forges a line; turns text around; cannot be encoded; rings; a one-byte escape; overwrites a line."""


def refused(directory: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """`verify`, `inspect` and `doctor` end in the same kind of error, in which nothing steers a terminal."""
    for command in (["verify", str(directory)], ["inspect", str(directory)], ["doctor", str(directory)]):
        assert main(command) == 1
        shown = capsys.readouterr()
        text = shown.out + shown.err
        assert all(word in text for word in words), text
        assert all(c.isprintable() or c == "\n" for c in text), ascii(text)
        assert not any(line.startswith("FAKE") for line in text.splitlines())


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
class TestNames:
    def test_of_a_described_tensor(self, micro_copy: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
        edit(micro_copy / DESCRIPTION, lambda data: data.update({f"model.{text}.weight": "FLOAT"}))
        refused(micro_copy, capsys, DESCRIPTION, "cannot be printed")

    def test_of_a_type(self, micro_copy: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
        edit(micro_copy / DESCRIPTION, lambda data: data.update({"model.layers.1.mlp.down_proj.weight": text}))
        refused(micro_copy, capsys, DESCRIPTION, "cannot be printed")

    def test_of_a_tensor_in_the_index(self, micro_copy: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
        edit(micro_copy / INDEX, lambda data: data["weight_map"].update({text: WEIGHTS}))
        refused(micro_copy, capsys, INDEX, "cannot be printed")

    def test_of_a_shard(self, micro_copy: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
        edit(micro_copy / INDEX, lambda data: data["weight_map"].update({"lm_head.weight": f"{text}.safetensors"}))
        refused(micro_copy, capsys, INDEX, "cannot be printed")

    def test_of_a_stored_tensor(self, micro_copy: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
        file = micro_copy / WEIGHTS
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header[text] = header.pop("model.norm.weight")
        new = json.dumps(header).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])
        # safetensors itself takes no header with half of a surrogate pair.
        word = "unexpected end of hex escape" if text == "\ud800" else "cannot be printed"
        refused(micro_copy, capsys, WEIGHTS, word)

    def test_in_any_other_message(self, text: str) -> None:
        shown = str(CheckpointError(f"layer {text}: no"))
        assert all(c.isprintable() or c == "\n" for c in shown)


@pytest.mark.parametrize("digits", [20, 5000])
def test_numbers_in_names(micro_copy: Path, capsys: pytest.CaptureFixture[str], digits: int) -> None:
    """Python refuses to convert numbers of more than 4300 digits, with an error of its own."""
    name = f"model.layers.{'9' * digits}.mlp.up_proj.weight"
    edit(micro_copy / DESCRIPTION, lambda data: data.update({name: "FLOAT"}))
    refused(micro_copy, capsys, DESCRIPTION, "has a number of more than 18 digits")


NESTED = {
    "list": "[" * 100_000 + "]" * 100_000,
    "object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "not so deep": "[" * (MAX_JSON_DEPTH + 1) + "]" * (MAX_JSON_DEPTH + 1),
}


@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize("name", [DESCRIPTION, INDEX, "config.json"])
def test_deep_nesting(micro_copy: Path, capsys: pytest.CaptureFixture[str], name: str, nested: str) -> None:
    (micro_copy / name).write_text(f'{{"deep": {NESTED[nested]}}}')
    refused(micro_copy, capsys, name, "JSON" if nested != "not so deep" else f"more than {MAX_JSON_DEPTH} levels")


def test_the_deepest_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ' * MAX_JSON_DEPTH + "1" + "}" * MAX_JSON_DEPTH)
    assert list(read_json_object(tmp_path / "a.json")) == ["a"]


@pytest.mark.parametrize("name", [DESCRIPTION, INDEX, "config.json"])
def test_large_json(
    micro_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The limit is lowered: the real one would take a second. A sparse file shows that nothing is read."""
    monkeypatch.setattr(description_module, "MAX_JSON_BYTES", 1 << 20)
    os.truncate(micro_copy / name, (1 << 20) + 1)
    refused(micro_copy, capsys, name, "1048577 bytes of JSON")


def test_the_limit_leaves_room_for_real_models() -> None:
    assert (MICRO / DESCRIPTION).stat().st_size * 1000 < description_module.MAX_JSON_BYTES < 1 << 30


def test_huge_numbers(micro_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (micro_copy / "config.json").write_text('{"hidden_size": ' + "9" * 10_000 + "}")
    refused(micro_copy, capsys, "config.json", "not valid JSON")


@pytest.mark.parametrize("name", [DESCRIPTION, INDEX, "config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
def test_what_is_no_file_is_not_read(
    micro_copy: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    (micro_copy / name).unlink()
    if kind == "pipe":
        os.mkfifo(micro_copy / name)
    elif kind == "directory":
        (micro_copy / name).mkdir()
    else:
        (micro_copy / name).symlink_to("/dev/zero")
    refused(micro_copy, capsys, name)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/elsewhere.safetensors", "a/../../b", "x" * 300])
def test_the_index_leads_out_of_the_directory(micro_copy: Path, capsys: pytest.CaptureFixture[str], shard: str) -> None:
    (micro_copy.parent / "elsewhere.safetensors").write_bytes((micro_copy / WEIGHTS).read_bytes())
    edit(micro_copy / INDEX, lambda data: data["weight_map"].update({"lm_head.weight": shard}))
    refused(micro_copy, capsys, INDEX, "outside the checkpoint directory" if "/" in shard else "is missing")


def test_links_of_a_hub_cache_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(MICRO.iterdir())):
        (blobs / f"{number:04x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:04x}")
    assert main(["verify", str(snapshot)]) == 0, capsys.readouterr()
    assert CheckpointReader(snapshot).tensors.keys() == CheckpointReader(MICRO).tensors.keys()


def test_what_a_hub_says_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and a description that were read by vLLM's client of the hub, not by us."""
    from vllm_w4a4_plugin.quantization import source

    deep: Any = {}
    for _ in range(MAX_JSON_DEPTH + 1):
        deep = {"a": deep}
    description = json.loads((MICRO / DESCRIPTION).read_text())
    headers = {f"model.{HOSTILE[0]}.weight": {"dtype": "F32", "shape": [1]}}
    monkeypatch.setattr(source, "get_hf_file_to_dict", lambda *_: {**description, "metadata": deep})
    monkeypatch.setattr(source, "try_get_local_file", lambda *_: None)
    monkeypatch.setattr(source, "get_safetensors_params_metadata", lambda *_, **__: headers)
    with pytest.raises(CheckpointError, match="levels deep"):
        source.open_checkpoint("some/model")
    monkeypatch.setattr(source, "get_hf_file_to_dict", lambda *_: description)
    with pytest.raises(CheckpointError, match="cannot be printed"):
        source.open_checkpoint("some/model")


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nbase: *c\n"


@pytest.mark.parametrize("text", [BOMB, "[" * 5000, "base: !!python/object/apply:os.getcwd []", "a: \x00"])
def test_recipes(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(CalibrationError, match=r"recipe\.yaml: (cannot be read as YAML|aliases)"):
        load_recipe(str(file))
