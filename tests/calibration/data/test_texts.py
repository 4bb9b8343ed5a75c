# SPDX-License-Identifier: Apache-2.0
"""Calibration files of every kind, good and bad."""

import json
from pathlib import Path

import pytest

from vllm_w4a4_plugin.calibration.data.texts import read_texts
from vllm_w4a4_plugin.calibration.errors import CalibrationError


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


def test_lines_of_jsonl_end_at_newlines_only(tmp_path: Path) -> None:
    """U+2028 and its kind end a line for str.splitlines, but may stand in a JSON string."""
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "one\u2028still\u0085one"}\r\n{"text": "two"}\r\n', encoding="utf-8")
    assert read_texts(file) == ["one\u2028still\u0085one", "two"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('["one"]', encoding="utf-8-sig")
    assert read_texts(tmp_path / "t.json") == ["one"]


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
        ("t.txt", None, "no such file"),
        ("t.json", b'["fine", "\\ud83d\\ude00 \\ud800"]', r"text 2 has a lone surrogate \(\\ud800\) at character 3"),
        ("t.jsonl", b'{"text": "a"}\n{"text": "\\udfff"}', r"t.jsonl:2: the text has a lone surrogate \(\\udfff\)"),
        ("t.json", b"[" * 100_000, "not valid JSON"),
        ("t.json", b"[" + b"1" * 5000 + b"]", "not valid JSON"),
    ],
)
def test_bad_files(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_texts(tmp_path / name)
