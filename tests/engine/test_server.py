# SPDX-License-Identifier: Apache-2.0
"""A real server, started and queried as the public tutorial does."""

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DESCRIPTION
from tests.engine.serving import CURL, VLLM, command
from tools.demo import free_port, running, wait_until_healthy

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    port = free_port()
    with running([*command(), "--port", str(port)]) as server:
        wait_until_healthy(server, f"http://127.0.0.1:{port}/health")
        yield port


def check_answer(text: str) -> None:
    answer: dict[str, Any] = json.loads(text)
    assert answer["model"] == "qwen3-32b-w4a4"
    assert answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 128 or answer["choices"][0]["finish_reason"] == "stop"


def test_the_tutorials_curl_command(port: int) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed (Debian, Ubuntu: apt-get install curl); the next test sends the same bytes")
    curl = CURL.replace("localhost:8000", f"localhost:{port}")
    result = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    check_answer(result.stdout)


@pytest.mark.feature("`vllm serve`: completions, streaming, `AsyncLLM`")
def test_the_same_request_without_curl(port: int) -> None:
    body = CURL.partition("-d '")[2].rpartition("'")[0].encode()
    url = f"http://localhost:{port}/v1/completions"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        check_answer(response.read().decode())


def test_streaming(port: int) -> None:
    body = {"model": "qwen3-32b-w4a4", "prompt": "what is", "max_tokens": 5, "temperature": 0, "stream": True}
    url = f"http://localhost:{port}/v1/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) >= 2


def test_a_refusal_ends_in_one_readable_line(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    edit_json(DESCRIPTION, {"model.layers.1.mlp.down_proj.weight": "W5A5"})
    result = subprocess.run(
        [VLLM, "serve", str(micro_copy), "--quantization", "ascend"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "CheckpointError: " in last
    assert "unknown quant type 'W5A5'" in last
    assert "pydantic" not in result.stderr.partition("CheckpointError: ")[2]
