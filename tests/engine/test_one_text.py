# SPDX-License-Identifier: Apache-2.0
"""Servers of several processes and nodes answer the tutorial's request with the text of one rank."""

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.engine.nodes import USABLE, WHY_NOT, two_nodes
from tests.engine.serving import ask, command, serving, text_of_one_rank
from tools.demo import running

needs_ranks = pytest.mark.skipif(os.environ.get("W4A4_RANKS") != "1", reason="minutes of CI: W4A4_RANKS=1 runs it")
needs_ray = pytest.mark.skipif(
    os.environ.get("W4A4_RAY") != "1", reason="vLLM does not bring Ray: install it, W4A4_RAY=1 runs this"
)
needs_nodes = pytest.mark.skipif(not USABLE, reason=WHY_NOT)
pytestmark = pytest.mark.engine

FLOAT32 = ("--dtype", "float32")
PORT, MASTER_PORT, RAY_PORT = 8000, 29500, 6379
"""Free on nodes that were just made."""


def start_ray(*options: str, inside: Sequence[str] = ()) -> None:
    ray = [*inside, sys.executable, "-m", "ray.scripts.scripts", "start"]
    # Without an authentication mode, a node expects a token in the home directory of its user.
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    subprocess.run([*ray, *options, "--num-cpus=1", "--disable-usage-stats"], check=True, env=environment)


@pytest.mark.feature("data parallelism (`--data-parallel-size`)", flag="W4A4_RANKS")
@needs_ranks
def test_two_engines() -> None:
    with serving(*FLOAT32, "--data-parallel-size", "2") as port:
        texts = {ask(port) for _ in range(4)}
    assert texts == {text_of_one_rank(*FLOAT32)}


@pytest.mark.feature("several nodes (`--nnodes`)", flag="W4A4_RANKS")
@needs_ranks
@needs_nodes
def test_two_nodes() -> None:
    with two_nodes() as (first, second):
        together = ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", first.address]
        together += ["--master-port", str(MASTER_PORT), *FLOAT32]
        with (
            running([*second.inside, *command(*together), "--node-rank", "1", "--headless"]),
            serving(*together, "--node-rank", "0", port=PORT, inside=first.inside) as port,
        ):
            text = ask(port, first.inside)
    assert text == text_of_one_rank(*FLOAT32)


@pytest.mark.feature("Ray, two nodes", flag="W4A4_RAY")
@needs_ray
@needs_nodes
def test_ray_on_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node has a place for one rank, so each rank is on a node of its own."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with two_nodes() as (first, second):
        head = f"{first.address}:{RAY_PORT}"
        place = ["--num-gpus=1", "--object-store-memory=100000000"]
        own = [[f"--node-ip-address={node.address}", f"--temp-dir={node.directory}"] for node in (first, second)]
        start_ray("--head", f"--port={RAY_PORT}", "--include-dashboard=false", *place, *own[0], inside=first.inside)
        start_ray(f"--address={head}", *place, *own[1], inside=second.inside)
        together = ["--tensor-parallel-size", "2", "--distributed-executor-backend", "ray", *FLOAT32]
        inside = [*first.inside, f"RAY_ADDRESS={head}"]
        with serving(*together, port=PORT, inside=inside) as port:
            text = ask(port, first.inside)
    assert text == text_of_one_rank(*FLOAT32)
