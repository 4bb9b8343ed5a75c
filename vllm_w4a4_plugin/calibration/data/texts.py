# SPDX-License-Identifier: Apache-2.0
"""Texts from a file of one of several kinds."""

import json
from collections.abc import Callable
from pathlib import Path

from ..errors import CalibrationError

JSONL_KEYS = ("inputs_pretokenized", "text")


def read_texts(file: Path) -> list[str]:
    """The texts in a file: `.json` (array of strings), `.jsonl` (see `JSONL_KEYS`) or `.txt` (one text).

    Raises:
        CalibrationError: the file is missing, of another kind, malformed, or holds no text; or a text has half of a
            surrogate pair, which JSON can spell but no tokenizer accepts.
    """
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise CalibrationError(f"{file}: is no file of text.")
    try:
        content = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CalibrationError(f"{file}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    readers: dict[str, Callable[[Path, str], list[str]]] = {".json": _json, ".jsonl": _jsonl, ".txt": _txt}
    if file.suffix not in readers:
        raise CalibrationError(f"{file}: expected a file name ending in {', '.join(readers)}, found {file.suffix!r}.")
    texts = [text for text in readers[file.suffix](file, content) if text.strip()]
    if not texts:
        raise CalibrationError(f"{file}: holds no text.")
    return texts


def _json(file: Path, content: str) -> list[str]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(data, list) or not all(isinstance(text, str) for text in data):
        raise CalibrationError(f"{file}: expected a JSON array of strings.")
    for number, text in enumerate(data, 1):
        _check_unicode(text, f"{file}: text {number}")
    return data


def _jsonl(file: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), 1):  # strings may hold other characters that end a line
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{file}:{number}: not valid JSON: {error}") from None
        text = next((record[k] for k in JSONL_KEYS if k in record), None) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise CalibrationError(
                f"{file}:{number}: expected an object with a string under {' or '.join(map(repr, JSONL_KEYS))}."
            )
        _check_unicode(text, f"{file}:{number}: the text")
        texts.append(text)
    return texts


def _check_unicode(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{place} has a lone surrogate (\\u{ord(text[error.start]):04x}) at character {error.start + 1}, which is "
            "not valid Unicode. Remove it or replace it by \\ufffd."
        ) from None


def _txt(file: Path, content: str) -> list[str]:
    return [content]
