# SPDX-License-Identifier: Apache-2.0
"""Clients of a server under load: well-behaved ones whose answers are compared, and all kinds of others."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

MODEL = "under-load"
TOKENS = 24
NEAR_TIE = 0.02
"""Difference of log probabilities below which two tokens may change places: other batches add attention's sums in
another order."""


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        tokens: as text, one by one.
        gaps: by how much the log probability of each exceeds that of the next likeliest.
    """

    tokens: tuple[str, ...]
    gaps: tuple[float, ...]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Token ids of prompts of many lengths."""
    draw = random.Random(seed)
    return [[draw.randrange(3, 500) for _ in range(draw.choice((3, 17, 40, 120, 300)))] for _ in range(count)]


def body(prompt: list[int], **changes: Any) -> dict[str, Any]:
    base = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 2, "ignore_eos": True}
    return {**base, **changes}


async def answer(session: aiohttp.ClientSession, prompt: list[int]) -> Answer:
    async with session.post("/v1/completions", json=body(prompt)) as response:
        content = await response.json()
        assert response.status == 200, content
    found = content["choices"][0]["logprobs"]
    gaps = []
    for top in found["top_logprobs"]:
        first, *rest = sorted(top.values(), reverse=True)
        gaps.append(first - rest[0] if rest else float("inf"))
    return Answer(tuple(found["tokens"]), tuple(gaps))


def parts_at_a_near_tie(expected: Answer, found: Answer) -> bool:
    """Whether the first difference of two answers is where two tokens were nearly equally likely."""
    differing = (
        place for place, pair in enumerate(zip(expected.tokens, found.tokens, strict=True)) if len(set(pair)) > 1
    )
    return expected.gaps[next(differing)] < NEAR_TIE


BAD_PARAMETERS: tuple[dict[str, Any], ...] = (
    {"temperature": -1}, {"top_p": 2}, {"n": 0}, {"max_tokens": -5}, {"max_tokens": 10**9}, {"logprobs": 10**6},
    {"prompt": None}, {"prompt": [-1]}, {"prompt": [10**9]}, {"prompt": {"a": 1}}, {"stop": 7}, {"model": "other"},
    {"temperature": "hot"}, {"stream": "maybe"}, {"top_k": -7}, {"min_p": 3}, {"logit_bias": {"x": 1}}, {"seed": "x"},
    {"presence_penalty": 99}, {"response_format": {"type": "x"}}, {"prompt": ""}, {"best_of": -1}, {"echo": 5},
)  # fmt: skip
"""Most are refused with a status of 4xx; none may end in a 5xx or hang."""


@dataclass
class Load:
    """Many clients at once, until a time has passed.

    Attributes:
        expected: prompt number -> its answer on an idle server.
        prompts: by number.
        count: what happened, by kind.
        wrong: descriptions of answers that differ where they must not.
    """

    expected: list[Answer]
    prompts: list[list[int]]
    count: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def run(self, url: str, clients: int, seconds: float, tick: Callable[[], None]) -> None:
        """Keep `clients` clients busy for `seconds`; `tick` is called about once a second."""
        stop = time.monotonic() + seconds
        kinds = (self.normal, self.normal, self.normal, self.cancelled, self.oversize, self.bad, self.disconnected)
        timeout = aiohttp.ClientTimeout(total=300)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:

            async def client(number: int) -> None:
                draw = random.Random(number)
                while time.monotonic() < stop:
                    await draw.choice(kinds)(session, draw)

            async def ticks() -> None:
                while time.monotonic() < stop:
                    tick()
                    await asyncio.sleep(1)

            work: list[Awaitable[None]] = [client(number) for number in range(clients)]
            await asyncio.gather(ticks(), *work)

    async def normal(self, session: aiohttp.ClientSession, draw: random.Random) -> None:
        number = draw.randrange(len(self.prompts))
        found, expected = await answer(session, self.prompts[number]), self.expected[number]
        if found.tokens == expected.tokens:
            self.count["answers equal to the idle server's"] += 1
        elif parts_at_a_near_tie(expected, found):
            self.count["answers that part at a near tie"] += 1
        else:
            self.wrong.append(f"prompt {number}: expected {expected.tokens}, found {found.tokens}")

    async def cancelled(self, session: aiohttp.ClientSession, draw: random.Random) -> None:
        """Leaves in mid-stream."""
        number, left = draw.randrange(len(self.prompts)), draw.randrange(1, 12)
        async with session.post("/v1/completions", json=body(self.prompts[number], stream=True)) as response:
            async for _ in response.content:
                left -= 1
                if left == 0:
                    break
        self.count["streams that a client left"] += 1

    async def oversize(self, session: aiohttp.ClientSession, draw: random.Random) -> None:
        prompt = [5] * draw.choice((513, 2000, 50_000))
        async with session.post("/v1/completions", json=body(prompt)) as response:
            await response.read()
            self._refused("oversize prompts refused", response.status, "an oversize prompt")

    async def bad(self, session: aiohttp.ClientSession, draw: random.Random) -> None:
        if draw.random() < 0.2:
            data = draw.choice((b"", b"{", b"\xff\xfe", b"[" * 5000, b"null", b'{"model": 1}'))
            headers = {"Content-Type": "application/json"}
            async with session.post("/v1/completions", data=data, headers=headers) as response:
                await response.read()
                self._refused("bodies that are no request refused", response.status, repr(data[:20]))
            return
        changes = draw.choice(BAD_PARAMETERS)
        request = {**body(self.prompts[0], max_tokens=2), **changes}
        async with session.post("/v1/completions", json=request) as response:
            await response.read()
            if response.status == 200:
                self.count["odd parameters accepted"] += 1
            else:
                self._refused("bad parameters refused", response.status, json.dumps(changes))

    async def disconnected(self, session: aiohttp.ClientSession, draw: random.Random) -> None:
        """Leaves before the answer comes."""
        number = draw.randrange(len(self.prompts))
        try:
            async with asyncio.timeout(draw.random() * 0.3):
                await answer(session, self.prompts[number])
        except TimeoutError:
            self.count["requests that a client left"] += 1

    def _refused(self, kind: str, status: int, what: str) -> None:
        if 400 <= status < 500:
            self.count[kind] += 1
        else:
            self.wrong.append(f"{what}: expected a status of 4xx, found {status}")
