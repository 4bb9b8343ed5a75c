# SPDX-License-Identifier: Apache-2.0
"""What config.json says of any model."""

import re
from collections.abc import Mapping
from typing import Any

HEAD, EMBEDDING = "lm_head", "embed_tokens"

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def layer_number(name: str) -> int | None:
    """Number of the block that a tensor or module belongs to, None if to none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model; of most models all of it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


TIED_BY_DEFAULT = ("cohere", "cohere2", "gemma", "gemma2", "gemma3", "gemma3_text", "smollm3", "starcoder2")
"""Values of `model_type` for which transformers ties head and embedding where config.json does not say."""


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the token embedding."""
    text, key = text_config(config), "tie_word_embeddings"
    return bool(text.get(key, config.get(key, text.get("model_type") in TIED_BY_DEFAULT)))


class SizeError(ValueError):
    """A size or a switch that config.json lacks, or one that cannot be."""


def size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A size from config.json.

    Args:
        config: decoded, or the part of it that describes the language model.
        key: of the size.
        default: where it is absent or null; None if it must be there.

    Raises:
        SizeError: it is missing, or no positive whole number.
    """
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise SizeError(f"{key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SizeError(f"{key} must be a positive whole number, found {value!r}")
    return value
