# SPDX-License-Identifier: Apache-2.0
"""Calibration text from files of several kinds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CalibrationError

SEPARATOR = "\n\n"
JSONL_KEYS = ("inputs_pretokenized", "text")
MINIMUM_TOKENS = 512


def read_texts(file: Path) -> list[str]:
    """Texts of a calibration file: `.json` (array of strings), `.jsonl` (`JSONL_KEYS`) or `.txt` (one text).

    Raises:
        CalibrationError: missing, of another kind, malformed, or without any text.
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


def token_rows(texts: list[str], tokenizer: Any, length: int, limit: int, source: str) -> Tensor:
    """Token ids [rows, n] of the texts, joined and cut into rows of equal length n <= length.

    Args:
        texts: joined by `SEPARATOR`.
        tokenizer: Hugging Face tokenizer.
        length: longest row; limit: most tokens in all.
        source: name for messages.
    """
    ids = tokenizer(SEPARATOR.join(texts), add_special_tokens=False, verbose=False).input_ids[:limit]
    if len(ids) < MINIMUM_TOKENS:
        raise CalibrationError(
            f"{source}: {len(ids)} tokens of text are too few to calibrate with; give at least {MINIMUM_TOKENS}, "
            "better 8192."
        )
    rows = -(-len(ids) // length)
    length = len(ids) // rows
    return torch.tensor(ids[: rows * length]).view(rows, length)


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
