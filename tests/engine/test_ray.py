# SPDX-License-Identifier: Apache-2.0
"""Two ranks that Ray starts. Needs the package ray."""

import gc
import os
from collections.abc import Iterator

import pytest
from vllm import LLM

from tests.conftest import MICRO
from tests.engine.oracle import engine_logprobs, prompt_logprobs
from tests.engine.texts import prompts

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.environ.get("W4A4_RAY") != "1", reason="needs the package ray: W4A4_RAY=1 runs it"),
]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `ray start --head --num-gpus=2` makes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_gpus": 2, "num_cpus": 2, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield
    cluster.shutdown()


@pytest.mark.feature("Ray (`--distributed-executor-backend ray`), one node", flag="W4A4_RAY")
@pytest.mark.usefixtures("cluster")
def test_two_ranks() -> None:
    llm = LLM(
        str(MICRO),
        quantization="ascend",
        max_model_len=128,
        dtype="float32",
        enforce_eager=True,
        tensor_parallel_size=2,
        distributed_executor_backend="ray",
        gpu_memory_utilization=0.2,
    )
    try:
        (tokens,) = prompts(1, shortest=96)
        difference = engine_logprobs(llm, tokens) - prompt_logprobs(MICRO, tokens)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    assert difference.abs().median() < 0.02
