# SPDX-License-Identifier: Apache-2.0
"""What config.json says of any model."""

import math
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
    """A size, a switch or another value that config.json lacks, or one that cannot be."""


LARGEST = {"num_hidden_layers": 10_000, "num_experts": 10_000}
LARGEST_SIZE = 1 << 24
"""Of anything else. No model comes near; but names are made of every layer and expert, factors are sought for widths,
and vLLM makes a table of all positions, all before any weight is looked at."""


def size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A size from config.json.

    Args:
        config: decoded, or the part of it that describes the language model.
        key: of the size.
        default: where it is absent or null; None if it must be there.

    Raises:
        SizeError: it is missing, no positive whole number, or too large.
    """
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise SizeError(f"{key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SizeError(f"{key} must be a positive whole number, found {value!r}")
    most = LARGEST.get(key, LARGEST_SIZE)
    if value > most:
        raise SizeError(f"{key} must be at most {most}, found {value}")
    return value


def check_positive(config: Mapping[str, Any], key: str) -> None:
    """Check a value that is a positive number, where it is neither absent nor null.

    Raises:
        SizeError: it is no positive, finite number.
    """
    value = config.get(key)
    if value is not None and (
        not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf
    ):
        raise SizeError(f"{key} must be a positive number, found {value!r}")
