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
        CalibrationError: the file is missing, of another kind, malformed, or holds no text.
    """
    try:
        content = file.read_text(encoding="utf-8")
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
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(data, list) or not all(isinstance(text, str) for text in data):
        raise CalibrationError(f"{file}: expected a JSON array of strings.")
    return data


def _jsonl(file: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{file}:{number}: not valid JSON: {error}") from None
        text = next((record[k] for k in JSONL_KEYS if k in record), None) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise CalibrationError(
                f"{file}:{number}: expected an object with a string under {' or '.join(map(repr, JSONL_KEYS))}."
            )
        texts.append(text)
    return texts


def _txt(file: Path, content: str) -> list[str]:
    return [content]
