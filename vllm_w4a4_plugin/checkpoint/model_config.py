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


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the token embedding."""
    return bool(text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
