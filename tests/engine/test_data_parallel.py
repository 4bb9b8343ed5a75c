# SPDX-License-Identifier: Apache-2.0
"""A server with two engines, between which vLLM distributes the requests."""

import json
import os
import re
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MICRO
from tests.engine.oracle import prompt_logprobs
from tests.engine.texts import prompts
from tools.demo import MODEST_MEMORY, free_port, running, wait_until_healthy

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.environ.get("W4A4_RANKS") != "1", reason="a minute of CI: W4A4_RANKS=1 runs it"),
]
LENGTH = 8


def complete(url: str, prompt: list[int]) -> dict[str, Any]:
    """A greedy completion with the log probabilities of its tokens, whose texts are `token_id:N`."""
    body = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": LENGTH,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["logprobs"]


@pytest.mark.feature("data parallelism (`--data-parallel-size`)", flag="W4A4_RANKS")
def test_two_engines_answer_as_the_model_does() -> None:
    port = free_port()
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(MICRO), "--served-model-name", "m"]
    command += ["--max-model-len", "128", "--dtype", "float32", "--enforce-eager", "--data-parallel-size", "2"]
    url = f"http://127.0.0.1:{port}"
    with running([*command, *MODEST_MEMORY, "--quantization", "ascend", "--port", str(port)]) as server:
        wait_until_healthy(server, f"{url}/health")
        with ThreadPoolExecutor(8) as pool:
            asked = prompts(16, shortest=20)
            answers = list(pool.map(lambda prompt: complete(url, prompt), asked))
        with urllib.request.urlopen(f"{url}/metrics") as response:
            metrics = response.read().decode()
    for prompt, answer in zip(asked, answers, strict=True):
        tokens = [int(text.removeprefix("token_id:")) for text in answer["tokens"]]
        expected = prompt_logprobs(MICRO, prompt + tokens)[-LENGTH:]
        assert (torch.tensor(answer["token_logprobs"]) - expected).abs().median() < 0.02
    served = re.findall(r'vllm:request_success_total\{.*engine="(\d)".*finished_reason="length".*\} ([0-9.]+)', metrics)
    assert {engine for engine, count in served if float(count) > 0} == {"0", "1"}
