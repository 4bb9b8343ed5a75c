# SPDX-License-Identifier: Apache-2.0
"""Damaged calibration text and recipes are read, or end in CalibrationError. W4A4_FUZZ=20000 tries so many."""

import faulthandler
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from vllm_w4a4_plugin.calibration.data.texts import read_texts
from vllm_w4a4_plugin.calibration.errors import CalibrationError
from vllm_w4a4_plugin.calibration.recipe import RECIPES, load_recipe
from vllm_w4a4_plugin.checkpoint import QuantType

CASES = int(os.environ.get("W4A4_FUZZ", "1000"))
TEXTS = {
    "text.json": '["One text, \\u00e9 and \\ud83d\\ude00.", "Another\\ntext.", ""]',
    "text.jsonl": '{"text": "One."}\n{"inputs_pretokenized": "Two.", "n": [1, {"a": null}]}\n\n{"text": "3"}\n',
    "text.txt": "Plain text,\nnaïve and 日本語.\n",
}
RECIPE = 'base: all-w4a4\nlayers:\n  "*.down_proj": W8A8_DYNAMIC\n  "model.layers.1.*": FLOAT\n  "*.o_proj": FLOAT\n'
PIECES = (
    b"\xff", b"\x00", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"\x1b[31m", b"{", b"}", b"[", b"]",
    b'"', b",", b":", b"null", b"NaN", b"1e999", b"-", b"9" * 5000, b"[" * 100_000, b'{"a":' * 2000, b"&a ", b"*a",
    b"!!python/object/apply:os.system ['false']", b"!!binary x", b"? ", b"- ", b"\t", b"%TAG ! x", b"--- ", b"... ",
    b"<<: ", b"2001-01-01", b"0o7", b"1:2", b"~", b"|", b">",
)  # fmt: skip


def damaged(data: bytes, random: Random) -> bytes:
    """The same bytes with one to three changes."""
    for _ in range(random.choice((1, 1, 2, 3))):
        place = random.randrange(len(data) + 1)
        way = random.randrange(5)
        if way == 0 and place < len(data):
            data = data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]
        elif way == 1:
            data = data[:place]
        elif way == 2:
            data = data[:place] + data[place + random.choice((1, 3, 10)) :]
        elif way == 3:
            data = data[:place] + random.choice(PIECES) + data[place:]
        else:
            stop = random.randrange(len(data) + 1)
            data = data[:place] + data[min(place, stop) : max(place, stop)] + data[place:]
    return data


def outcomes(originals: dict[str, bytes], folder: Path, read: Callable[[Path], None]) -> Counter[str]:
    """Read damaged files; anything but CalibrationError comes out."""
    count: Counter[str] = Counter()
    for number in range(CASES):
        random = Random(number)
        name = random.choice(sorted(originals))
        file = folder / name
        file.write_bytes(damaged(originals[name], random))
        faulthandler.dump_traceback_later(60, exit=True)
        message = ""
        try:
            read(file)
        except CalibrationError as error:
            message = str(error)
        finally:
            faulthandler.cancel_dump_traceback_later()
        assert not message or name in message, (number, message)
        assert message.replace("\n", "").isprintable(), (number, message)
        assert len(message) < 2000, (number, len(message))
        count["refused" if message else "read"] += 1
    return count


def test_damaged_text(tmp_path: Path) -> None:
    def read(file: Path) -> None:
        texts = read_texts(file)
        assert texts
        for text in texts:
            assert text.strip()
            text.encode()  # no half of a surrogate pair

    count = outcomes({name: text.encode() for name, text in TEXTS.items()}, tmp_path, read)
    assert min(count["read"], count["refused"]) > CASES / 10


def test_damaged_recipes(tmp_path: Path) -> None:
    allowed = {kind for types in RECIPES.values() for kind in types.values()} | {QuantType.W4A8_DYNAMIC}

    def read(file: Path) -> None:
        recipe = load_recipe(str(file))
        assert set(recipe.types.values()) <= allowed
        assert all(isinstance(pattern, str) and kind in allowed for pattern, kind in recipe.exceptions)

    count = outcomes({"recipe.yaml": RECIPE.encode()}, tmp_path, read)
    assert min(count["read"], count["refused"]) > CASES / 20


@pytest.mark.parametrize("kind", ["pipe", "directory", "missing"])
def test_text_that_is_no_file(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "text.json"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    with pytest.raises(CalibrationError, match=r"text\.json"):
        read_texts(file)
