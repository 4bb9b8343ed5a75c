# SPDX-License-Identifier: Apache-2.0
"""Two ranks that Ray starts. Needs the package ray."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import MICRO
from tests.engine.engines import engine
from tests.engine.oracle import engine_logprobs, prompt_logprobs
from tests.engine.serving import ask, serving, text_of_one_rank
from tests.engine.texts import prompts
from tools.demo import free_port

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.environ.get("W4A4_RAY") != "1", reason="vLLM does not bring Ray: install it, W4A4_RAY=1"),
]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray node for two ranks, started as docs/several-processes.md says; vLLM finds it by itself."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    options = [f"--port={free_port()}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    subprocess.run([*ray, "start", "--head", "--num-gpus=2", *options], check=True)
    yield
    subprocess.run([*ray, "stop"], check=True)


@pytest.mark.feature("Ray (`--distributed-executor-backend ray`), one node", flag="W4A4_RAY")
@pytest.mark.usefixtures("cluster")
def test_two_ranks() -> None:
    with engine(MICRO, quantization="ascend", tensor_parallel_size=2, distributed_executor_backend="ray") as llm:
        (tokens,) = prompts(1, shortest=96)
        difference = engine_logprobs(llm, tokens) - prompt_logprobs(MICRO, tokens)
    assert difference.abs().median() < 0.02


@pytest.mark.feature("Ray (`--distributed-executor-backend ray`), one node", flag="W4A4_RAY")
@pytest.mark.usefixtures("cluster")
def test_the_tutorials_request() -> None:
    """A server with two ranks of Ray's answers with the text of one rank."""
    float32 = ("--dtype", "float32")
    with serving(*float32, "--tensor-parallel-size", "2", "--distributed-executor-backend", "ray") as port:
        text = ask(port)
    assert text == text_of_one_rank(*float32)
