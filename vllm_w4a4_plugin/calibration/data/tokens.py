# SPDX-License-Identifier: Apache-2.0
"""Token ids of calibration text."""

from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError

SEPARATOR = "\n\n"
MINIMUM_TOKENS = 512


def join_texts(texts: list[str], tokenizer: Any) -> list[int]:
    """Token ids of all texts, joined by `SEPARATOR`, without special tokens."""
    return tokenizer(SEPARATOR.join(texts), add_special_tokens=False, verbose=False).input_ids


def token_rows(texts: list[str], tokenizer: Any, length: int, limit: int, source: str) -> Tensor:
    """Token ids [rows, n] of the texts, joined and cut into rows of equal length n <= length.

    Args:
        texts: to be joined.
        tokenizer: of transformers.
        length: of the longest row allowed.
        limit: most tokens in all.
        source: name for messages.

    Raises:
        CalibrationError: there are fewer than `MINIMUM_TOKENS`.
    """
    ids = join_texts(texts, tokenizer)[:limit]
    if len(ids) < MINIMUM_TOKENS:
        raise CalibrationError(
            f"{source}: {len(ids)} tokens of text are too few to calibrate with; give at least {MINIMUM_TOKENS}, "
            "better 8192."
        )
    rows = -(-len(ids) // length)
    length = len(ids) // rows
    return torch.tensor(ids[: rows * length]).view(rows, length)
