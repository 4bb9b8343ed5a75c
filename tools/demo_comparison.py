# SPDX-License-Identifier: Apache-2.0
"""What the demo asks both models, and the table of their answers."""

import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import exp
from pathlib import Path
from typing import Any

from tools.demo_client import Client

QUESTIONS = (
    "What is the capital of France?",
    "Name three colors.",
    "What is a large language model?",
)
ANSWER_TOKENS = 48
SPEED_TOKENS = 64
COLUMN = 44
PASSAGE = """\
Rivers carry water from high land to the sea. Most of them begin as small streams in hills or mountains, where rain
and melting snow run together. On its way a river grows, because other streams flow into it. In steep country the
water is fast and cuts deep valleys into the rock. In flat country it slows down, bends from side to side and drops
the sand and mud that it has carried. Where a river meets the sea, this mud can build up new land, which is called a
delta.

People have lived beside rivers for thousands of years. The soil near them is good for growing food, boats can carry
goods from one town to the next, and the water can drive machines. Many of the world's largest cities stand on the
banks of a river: London on the Thames, Paris on the Seine and Cairo on the Nile. Rivers can also be dangerous. After
heavy rain they may rise above their banks and flood fields and houses, and so people have built walls and dams to
hold the water back. A dam also stores water for dry months and can be used to make electricity.
"""
"""A text for perplexity, written for this demo."""


@dataclass(frozen=True)
class Measured:
    """What one model did.

    Attributes:
        title: of its column.
        nbytes: of its weights' files.
        ready_s: seconds until its server was ready.
        tokens_per_s: of one request that generates text.
        perplexity: on `PASSAGE`.
        answers: to `QUESTIONS`.
    """

    title: str
    nbytes: int
    ready_s: float
    tokens_per_s: float
    perplexity: float
    answers: tuple[str, ...]


def measure(server: Client, title: str, model: Path) -> Measured:
    """Ask a server everything."""
    answers = tuple(_answer(server, question) for question in QUESTIONS)
    started = time.monotonic()
    server.ask("completions", prompt="Rivers", max_tokens=SPEED_TOKENS, ignore_eos=True, temperature=0)
    speed = SPEED_TOKENS / (time.monotonic() - started)
    reply = server.ask("completions", prompt=PASSAGE, max_tokens=1, prompt_logprobs=0)
    perplexity = perplexity_of(reply["choices"][0]["prompt_logprobs"])
    nbytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return Measured(title, nbytes, server.ready_s, speed, perplexity, answers)


def _answer(server: Client, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    reply = server.ask("chat/completions", messages=messages, max_tokens=ANSWER_TOKENS, temperature=0)
    choice = reply["choices"][0]
    return choice["message"]["content"].strip() + (" ..." if choice["finish_reason"] == "length" else "")


def perplexity_of(prompt_logprobs: Sequence[dict[str, Any] | None]) -> float:
    """Perplexity of a prompt from vLLM's reply, which has one entry per token and None for the first."""
    values = [next(iter(entry.values()))["logprob"] for entry in prompt_logprobs if entry]
    return exp(-sum(values) / len(values))


def table(models: Sequence[Measured]) -> str:
    """Figures and answers of the models side by side."""
    rows = [
        ("", [model.title for model in models]),
        ("weights", [f"{model.nbytes / 1e6:.0f} MB" for model in models]),
        ("server ready after", [f"{model.ready_s:.0f} s" for model in models]),
        ("speed, one request", [f"{model.tokens_per_s:.0f} tokens/s" for model in models]),
        ("perplexity of a short text", [f"{model.perplexity:.1f}" for model in models]),
        *((question, [model.answers[i] for model in models]) for i, question in enumerate(QUESTIONS)),
    ]
    label = 2 + max(len(row[0]) for row in rows if row[0] not in QUESTIONS)
    return "\n".join(line for name, cells in rows for line in _lines(name, cells, label))


def _lines(name: str, cells: Sequence[str], label: int) -> Iterator[str]:
    columns = [_wrapped(name, label - 2), *(_wrapped(cell, COLUMN - 2) for cell in cells)]
    widths = [label, *(COLUMN for _ in cells)]
    for parts in zip_longest(*columns, fillvalue=""):
        yield "".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()
    yield ""


def _wrapped(text: str, width: int) -> list[str]:
    return [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, width)] or [""]
