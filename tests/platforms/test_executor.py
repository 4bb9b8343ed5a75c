# SPDX-License-Identifier: Apache-2.0
"""Where the model computes: in the engine's process if it has one rank, with threads bound as vLLM binds a rank's."""

import os
from pathlib import Path
from typing import Any

import pytest
import vllm.utils.ompmultiprocessing as omp

from tests.conftest import DESCRIPTION, MICRO
from tests.loading import engine_config
from vllm_w4a4_plugin.platforms import executor

BINDING = ("OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


@pytest.fixture(autouse=True)
def no_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_assigned", {})
    for name in (*BINDING, "LD_PRELOAD"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what an engine's configuration sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")


def backend(**arguments: Any) -> object:
    return engine_config(MICRO, **arguments).parallel_config.distributed_executor_backend


def test_one_rank_computes_in_the_engines_process() -> None:
    assert backend() == "uni"
    assert os.environ["OMP_NUM_THREADS"] == "1"
    names = [name for name in ("OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY") if name in os.environ]
    assert [os.environ[name].strip("{}") for name in names] == ["0"]


def test_the_next_engine_starts_from_the_users_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    backend()
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    assert backend() == "uni"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert not [name for name in BINDING[1:] if name in os.environ]


@pytest.mark.parametrize("arguments", [{"distributed_executor_backend": "mp"}, {"data_parallel_size": 2}], ids=str)
def test_what_was_asked_for_stays(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    assert backend(**arguments) == "mp"
    assert not [name for name in BINDING if name in os.environ]


def test_several_ranks_have_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    assert backend(tensor_parallel_size=2) == "mp"


def test_other_models_are_vllms(micro_copy: Path) -> None:
    (micro_copy / DESCRIPTION).unlink()
    config = engine_config(micro_copy, quantization=None)
    assert config.parallel_config.distributed_executor_backend == "mp"


def test_the_variables_are_those_that_vllm_gives_a_ranks_process() -> None:
    config = engine_config(MICRO)
    chosen = {name: os.environ[name] for name in BINDING if name in os.environ}
    executor.forget_last_engine()
    with omp.OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0):
        assert {name: os.environ[name] for name in BINDING if name in os.environ} == chosen
