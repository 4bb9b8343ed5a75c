# SPDX-License-Identifier: Apache-2.0
"""Token ids of calibration text: samples spread over all of it, cut into rows of equal length."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError

SEPARATOR = "\n\n"
MINIMUM_TOKENS = 512
FEWEST_ROWS = 8  # some of them are held out
SHORTEST_SPAN = 64  # tokens; shorter texts are joined first
CHARACTERS_PER_TOKEN = 8  # read at first for every token that is wanted; ordinary text needs about half of that
WHOLE_UP_TO = 16  # characters per token that is wanted: text up to this size is tokenized whole


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model.

    Raises:
        CalibrationError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(
            f"{directory}: transformers cannot load the tokenizer: {reason}. Copy the tokenizer's files "
            "(tokenizer.json, tokenizer_config.json) into this directory."
        ) from None


def join_texts(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """Token ids of all texts, joined by `SEPARATOR`, without special tokens."""
    return tokenizer(SEPARATOR.join(texts), add_special_tokens=False, verbose=False).input_ids


def token_rows(texts: Sequence[str], tokenizer: Any, length: int, limit: int, source: str, seed: int = 0) -> Tensor:
    """Token ids [rows, n] of the texts, cut into at least `FEWEST_ROWS` rows of equal length n <= length.

    Texts of more than `limit` tokens are sampled: all of them are represented by equally many tokens as far as they
    have so many, and a long text by spans at even distances. Only these spans of a large file are tokenized.

    Args:
        texts: to be joined.
        tokenizer: of transformers.
        length: of the longest row allowed.
        limit: most tokens in all.
        source: name for messages.
        seed: shifts the spans.

    Raises:
        CalibrationError: there are fewer than `MINIMUM_TOKENS`.
    """
    ids = _sampled(texts, lambda text: join_texts([text], tokenizer), length, limit, seed)
    if len(ids) < MINIMUM_TOKENS:
        raise CalibrationError(
            f"{source}: {len(ids)} tokens of text are too few to calibrate with; give at least {MINIMUM_TOKENS}, "
            "better 8192."
        )
    rows, width = _shape(len(ids), length)
    return torch.tensor(ids[: rows * width]).view(rows, width)


def _shape(tokens: int, length: int) -> tuple[int, int]:
    """Number of rows and tokens in each."""
    rows = max(-(-tokens // length), FEWEST_ROWS)
    return rows, tokens // rows


def _sampled(texts: Sequence[str], encode: Callable[[str], list[int]], length: int, limit: int, seed: int) -> list[int]:
    _, width = _shape(limit, length)
    offset = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    if sum(map(len, texts)) <= WHOLE_UP_TO * limit:
        everything = encode(SEPARATOR.join(texts))
        if len(everything) <= limit:
            return everything
        tokens = [encode(text) for text in _merged(texts, limit // SHORTEST_SPAN)]
        return _fair(tokens, limit, lambda ids, count: _spread(ids, count, width, offset, list, 1))
    merged = _merged(texts, limit // SHORTEST_SPAN)
    return _fair(merged, limit, lambda text, count: _spread(text, count, width, offset, encode, CHARACTERS_PER_TOKEN))


def _merged(texts: Sequence[str], most: int) -> list[str]:
    """At most so many texts, neighbours joined."""
    count = min(len(texts), most)
    bounds = [len(texts) * i // count for i in range(count + 1)]
    return [SEPARATOR.join(texts[start:stop]) for start, stop in pairwise(bounds)]


def _fair(sources: Sequence[Any], count: int, take: Callable[[Any, int], list[int]]) -> list[int]:
    """`count` tokens, equally many of each source; what short sources lack comes from longer ones."""
    taken: dict[int, list[int]] = {}
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    for position, i in enumerate(order):
        taken[i] = take(sources[i], count // (len(order) - position))
        count -= len(taken[i])
    return [token for i in sorted(taken) for token in taken[i]]


def _spread(
    source: Any, count: int, width: int, offset: float, encode: Callable[[Any], list[int]], entries_per_token: int
) -> list[int]:
    """Up to `count` tokens of one text, in spans of at most `width` tokens at even distances.

    Args:
        source: the text, or its token ids.
        count: how many tokens.
        width: of the longest span.
        offset: place of a span within its part of the text, from 0 to 1.
        encode: token ids of a slice of `source`.
        entries_per_token: how long a slice is taken at first for each token.
    """
    result: list[int] = []
    spans = -(-count // width)
    for i in range(spans):
        part = source[len(source) * i // spans : len(source) * (i + 1) // spans]
        wanted = count * (i + 1) // spans - count * i // spans
        size, ids = entries_per_token * wanted, []
        while True:
            start = int(offset * max(0, len(part) - size))
            ids = encode(part[start : start + size])
            if len(ids) >= wanted or size >= len(part):
                break
            size *= 2
        result += ids[:wanted]
    return result
