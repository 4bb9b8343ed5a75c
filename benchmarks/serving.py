# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.serving: `vllm serve` with different numbers of cores and preloaded libraries.

A model with random weights and the shape of SmolLM2-135M is served once per variant. Clients send requests that stream
their answers, alone and eight at a time. Server, scheduler, model and client share the machine, as they do in use.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tools.demo import MODEST_MEMORY, free_port, running, wait_until_healthy

from . import publishing, random_model, report
from .end_to_end import SHAPES
from .kernels import machine
from .workload import tokens_of

SHAPE, RECIPE = "SmolLM2-135M", "all-w4a4"
PROMPT, ANSWER = 128, 64
"""Tokens of each request."""

AT_ONCE = (1, 8)
TCMALLOC = "libtcmalloc_minimal.so.4"
IOMP = "libiomp5.so"
VARIANTS = {
    "1 core reserved": (1, ()),
    "0 cores reserved": (0, ()),
    "1 core reserved, tcmalloc and libiomp": (1, (TCMALLOC, IOMP)),
    "0 cores reserved, tcmalloc": (0, (TCMALLOC,)),
    "0 cores reserved, tcmalloc and libiomp": (0, (TCMALLOC, IOMP)),
}
"""Cores that vLLM leaves to its scheduler, and libraries in LD_PRELOAD."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repetitions", type=int, default=4, help="repetitions within a server; medians are reported")
    parser.add_argument("--directory", type=Path, default=Path("build/benchmarks/models"), help="where the model is")
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks/serving.json"))
    parser.add_argument("--docs", type=Path, help="directory for performance-serving.md")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="do not measure; make the page from this run")
    options = parser.parse_args()
    result = json.loads(options.from_json.read_text()) if options.from_json else run(options)
    page = report.serving(result)
    print(page)
    if options.docs:
        publishing.refuse_if(publishing.load_faults(result["machine"]))
        (options.docs / "performance-serving.md").write_text(page)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each variant. Returns the contents of the JSON file."""
    model, layers = SHAPES[SHAPE]
    checkpoint = options.directory / f"{SHAPE}-{layers}-{RECIPE}"
    if not (checkpoint / "config.json").exists():
        random_model.make(checkpoint, model, layers, RECIPE)
    write_tokenizer(checkpoint, model.vocabulary)
    result: dict[str, Any] = {"machine": machine(), "model": SHAPE, "records": {}}
    result |= {"prompt": PROMPT, "answer": ANSWER}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for variant in options.variants:
        reserved, libraries = VARIANTS[variant]
        with server(checkpoint, reserved, [path_of(library) for library in libraries]) as url:
            result["records"][variant] = asyncio.run(measure(url, options.repetitions))
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(variant, result["records"][variant], flush=True)
    return result


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """A tokenizer in which each token is a word of its own: text has to be made of the tokens, as with a real one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)


def path_of(library: str) -> str:
    """The path of a library of the system (Debian: libtcmalloc-minimal4) or this environment (PyPI: intel-openmp)."""
    places = [Path(sys.prefix) / "lib", *Path("/usr/lib").glob("*-linux-gnu"), Path("/usr/lib64")]
    paths = [place / library for place in places if (place / library).exists()]
    if not paths:
        sys.exit(f"{library} is not installed: apt-get install libtcmalloc-minimal4; pip install intel-openmp")
    return str(paths[0])


@contextmanager
def server(checkpoint: Path, reserved: int, preloaded: list[str]) -> Iterator[str]:
    """`vllm serve` on a free port; yields its URL."""
    port = free_port()
    variables = {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": str(reserved),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "LD_PRELOAD": ":".join(preloaded),
    }
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(checkpoint), "--served-model-name", "m",
        "--max-model-len", "1024", "--max-num-seqs", str(max(AT_ONCE)), "--no-enable-prefix-caching",
        "--disable-log-stats", "--port", str(port), *MODEST_MEMORY,
    ]  # fmt: skip
    with running(command, variables) as process:
        wait_until_healthy(process, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"


async def measure(url: str, repetitions: int) -> dict[str, dict[str, float]]:
    """For each number of requests at once: seconds to the first token, seconds per later token, tokens per second."""
    records = {}
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(stream(session, url, number) for number in range(max(AT_ONCE))))  # warm-up
        for count in AT_ONCE:
            rounds = []
            for repetition in range(repetitions):
                begin = time.perf_counter()
                numbers = [100 * repetition + number for number in range(count)]
                times = await asyncio.gather(*(stream(session, url, number) for number in numbers))
                elapsed = time.perf_counter() - begin
                first = statistics.median(first for first, _ in times)
                later = statistics.median(later for _, later in times)
                rounds.append({"first": first, "later": later, "rate": count * ANSWER / elapsed})
            records[str(count)] = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    return records


async def stream(session: aiohttp.ClientSession, url: str, number: int) -> tuple[float, float]:
    """One request. Returns seconds to the first token, and seconds per token after it."""
    body = {"model": "m", "prompt": tokens_of(number, PROMPT), "max_tokens": ANSWER, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True}
    begin = time.perf_counter()
    arrivals = []
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                arrivals.append(time.perf_counter())
    return arrivals[0] - begin, (arrivals[-1] - arrivals[0]) / (ANSWER - 1)


if __name__ == "__main__":
    main()
