# SPDX-License-Identifier: Apache-2.0
"""A server under load, stopped in mid-stream, and with a worker killed. By flag, for it takes minutes of both cores.

W4A4_SOAK=60 keeps 200 clients busy for 60 seconds; W4A4_SOAK=1800 is a soak. The figures are printed (pytest -s).
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.conftest import MICRO
from tests.engine.load_clients import MODEL, Answer, Load, answer, body, prompts
from tools.demo import free_port, wait_until_healthy

SECONDS = float(os.environ.get("W4A4_SOAK", "0"))
CLIENTS, PROMPTS = 200, 40
SOAK = 180
"""Seconds from which on memory must be flat; before, buffers still grow."""
CACHE_BYTES = 256 << 20
"""Of keys and values. vLLM takes the block that has been free for longest, so all of it is touched within seconds; with
a larger cache, memory would grow for minutes until it is."""

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not SECONDS, reason="keeps both cores busy for minutes; W4A4_SOAK=60 runs it"),
    pytest.mark.timeout(600 + 2 * SECONDS),
]


class Server:
    """A running server and everything that it started."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process, self.url = process, url

    def family(self) -> list[psutil.Process]:
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    def memory(self) -> int:
        """Bytes of all its processes, each shared page counted once."""
        total = 0
        for process in self.family():
            try:
                total += process.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
        return total


def shared_memory(family: list[psutil.Process]) -> set[str]:
    """Files of shared memory that these processes have mapped: other tests have some of their own."""
    paths = set()
    for process in family:
        try:
            paths.update(mapped.path for mapped in process.memory_maps())
        except psutil.NoSuchProcess:
            continue
    return {path for path in paths if path.startswith("/dev/shm/") and Path(path).exists()}


@contextmanager
def serving(log: Path) -> Iterator[Server]:
    port = free_port()
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(MICRO), "--served-model-name", MODEL]
    command += ["--max-model-len", "512", "--dtype", "float32", "--quantization", "ascend", "--port", str(port)]
    command += ["--gpu-memory-utilization", "0.2", "--no-enable-prefix-caching", "--disable-log-stats"]
    command += ["--kv-cache-memory-bytes", str(CACHE_BYTES)]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    environment["HF_HUB_OFFLINE"] = "1"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}/health")
        yield Server(process, f"http://127.0.0.1:{port}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def idle_answers(url: str, wanted: list[list[int]]) -> list[Answer]:
    """One request at a time."""
    async with aiohttp.ClientSession(url) as session:
        return [await answer(session, prompt) for prompt in wanted]


def check_nothing_is_left(family: list[psutil.Process], shared: set[str]) -> None:
    _, alive = psutil.wait_procs(family, timeout=30)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert [path for path in shared if Path(path).exists()] == []


async def streams_while(url: str, wanted: list[list[int]], act: Callable[[], None]) -> list[tuple[list[str], bool]]:
    """Open streams, act when all have begun, and read what still comes: tokens, and whether the stream ended well."""
    begun: set[int] = set()

    async def stream(number: int) -> tuple[list[str], bool]:
        tokens: list[str] = []
        try:
            timeout = aiohttp.ClientTimeout(total=60)
            async with (
                aiohttp.ClientSession(url, timeout=timeout) as session,
                session.post("/v1/completions", json=body(wanted[number], stream=True, max_tokens=200)) as response,
            ):
                async for line in response.content:
                    data = line.decode().strip().removeprefix("data: ")
                    if data == "[DONE]":
                        return tokens, True
                    if not data:
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        return tokens, False
                    tokens += (event["choices"][0]["logprobs"] or {}).get("tokens", [])
                    if len(tokens) >= 3:
                        begun.add(number)
        except (aiohttp.ClientError, TimeoutError):
            pass
        finally:
            begun.add(number)
        return tokens, False

    async def strike() -> None:
        while len(begun) < len(wanted):
            await asyncio.sleep(0.05)
        act()

    results = await asyncio.gather(strike(), *(stream(number) for number in range(len(wanted))))
    return results[1:]


def check_prefixes(expected: list[Answer], found: list[tuple[list[str], bool]]) -> None:
    """What came of each stream before it was cut off was right, as far as the idle server's answer goes."""
    for number, (tokens, _) in enumerate(found):
        places = zip(expected[number].tokens, expected[number].gaps, tokens, strict=False)
        differing = next(((gap, a, b) for a, gap, b in places if a != b), None)
        assert differing is None or differing[0] < 0.02, (number, differing)


def test_load_and_sigterm_in_mid_stream(tmp_path: Path) -> None:
    wanted = prompts(PROMPTS)
    with serving(tmp_path / "log") as server:
        expected = asyncio.run(idle_answers(server.url, wanted))
        assert asyncio.run(idle_answers(server.url, wanted)) == expected
        load, samples = Load(expected, wanted), []
        started = time.monotonic()

        def tick() -> None:
            samples.append((time.monotonic() - started, server.memory()))

        asyncio.run(load.run(server.url, CLIENTS, SECONDS, tick))
        _report(load, samples)
        assert load.wrong == []
        assert server.process.poll() is None
        again = asyncio.run(idle_answers(server.url, wanted))
        assert [found.tokens for found in again] == [answer.tokens for answer in expected]
        family = server.family()
        shared = shared_memory(family)
        found = asyncio.run(streams_while(server.url, wanted[:10], lambda: server.process.send_signal(signal.SIGTERM)))
        check_prefixes(expected, found)
        code = server.process.wait(60)
        ended = sum(well for _, well in found)
        print(f"SIGTERM in mid-stream: {ended} of 10 streams ended, exit code {code}", file=sys.stderr)
        assert code in (0, -signal.SIGTERM), (tmp_path / "log").read_text()[-2000:]
        check_nothing_is_left(family, shared)
    if SECONDS >= SOAK:
        _check_memory(samples)


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    wanted = prompts(10)
    with serving(tmp_path / "log") as server:
        expected = asyncio.run(idle_answers(server.url, wanted))
        family = server.family()
        shared = shared_memory(family)
        workers = [process for process in family if "EngineCore" in " ".join([*process.cmdline(), process.name()])]
        assert len(workers) == 1, [process.cmdline() for process in family]
        found = asyncio.run(streams_while(server.url, wanted, workers[0].kill))
        check_prefixes(expected, found)
        code = server.process.wait(60)
        # vLLM's server notices, ends all streams with an error and exits, with code 0 in version 0.32.
        print(f"worker killed: {sum(well for _, well in found)} of 10 streams ended, exit code {code}", file=sys.stderr)
        assert not any(well for _, well in found)
        check_nothing_is_left(family, shared)


def _report(load: Load, samples: list[tuple[float, int]]) -> None:
    counts: dict[str, Any] = dict(load.count)
    megabytes = [size / 1e6 for _, size in samples]
    print(
        f"{CLIENTS} clients for {SECONDS:.0f} s: {json.dumps(counts)}; memory {megabytes[0]:.0f} MB at first, "
        f"{max(megabytes):.0f} MB at most, {[round(size / 1e6) for size in _by_fifths(samples)]} MB by fifths",
        file=sys.stderr,
    )


def _by_fifths(samples: list[tuple[float, int]]) -> list[float]:
    """Mean bytes in each fifth of the time."""
    count = len(samples) // 5
    assert count > 0
    return [sum(size for _, size in samples[first : first + count]) / count for first in range(0, 5 * count, count)]


def _check_memory(samples: list[tuple[float, int]]) -> None:
    """The last fifth of the time needs no more than the fifth after the first, in which buffers fill."""
    _, early, *_, late = _by_fifths(samples)
    assert late < 1.03 * early + 20e6, [round(size / 1e6) for _, size in samples]
