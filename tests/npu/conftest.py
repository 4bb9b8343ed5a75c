# SPDX-License-Identifier: Apache-2.0
"""These tests run beside vllm-ascend, on the stand-in for torch_npu: `make test-npu`, tests/test_beside_ascend.py."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tools.npu_environment import MARK

collect_ignore_glob = [] if MARK in os.environ else ["test_*.py"]

PRELOADED = ["tests.npu.preloaded"]


@pytest.fixture(scope="session")
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    """Runs each function in a process that has imported vLLM, with vllm-ascend as platform, and no more."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
        yield pool
