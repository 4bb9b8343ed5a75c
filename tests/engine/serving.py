# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with the micro checkpoint, and the public tutorial's request to it."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.conftest import MICRO
from tools.demo import MODEST_MEMORY, START_TIMEOUT_S, free_port, running

VLLM = str(Path(sys.executable).parent / "vllm")
NAME = "qwen3-32b-w4a4"

# The tutorial's command, word for word.
CURL = """curl http://localhost:8000/v1/completions \\
    -H "Content-Type: application/json" \\
    -d '{
        "model": "qwen3-32b-w4a4",
        "prompt": "what is large language model?",
        "max_tokens": "128",
        "top_p": "0.95",
        "top_k": "40",
        "temperature": "0.0"
    }'
"""


def command(*options: str) -> list[str]:
    """The tutorial's command that starts a server."""
    serve = [VLLM, "serve", str(MICRO), "--served-model-name", NAME, "--max-model-len", "4096"]
    return [*serve, "--quantization", "ascend", "--enforce-eager", *MODEST_MEMORY, *options]


@contextmanager
def serving(*options: str, port: int = 0, inside: Sequence[str] = ()) -> Iterator[int]:
    """A server that is ready; yields its port.

    Args:
        options: further ones of `vllm serve`.
        port: 0 for a free one.
        inside: words before the command and before those that ask it, such as `ip netns exec NAME`.
    """
    port = port or free_port()
    with running([*inside, *command(*options), "--port", str(port)]) as server:
        health = [*inside, "curl", "--silent", "--fail", "--output", "/dev/null", f"http://localhost:{port}/health"]
        deadline = time.monotonic() + START_TIMEOUT_S
        while subprocess.run(health).returncode != 0:
            assert server.poll() is None, "the server ended before it was ready"
            assert time.monotonic() < deadline, "the server is not ready"
            time.sleep(1)
        yield port


def ask(port: int, inside: Sequence[str] = ()) -> str:
    """The text that the tutorial's curl command gets."""
    curl = CURL.replace("localhost:8000", f"localhost:{port}")
    result = subprocess.run([*inside, "sh", "-c", curl], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["choices"][0]["text"]


@cache
def text_of_one_rank(*options: str) -> str:
    """What a server with a single rank answers."""
    with serving(*options) as port:
        return ask(port)
