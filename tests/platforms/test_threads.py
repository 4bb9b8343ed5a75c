# SPDX-License-Identifier: Apache-2.0
"""Which cores the threads of each rank get."""

from pathlib import Path

import pytest
import vllm.envs
from hypothesis import given
from hypothesis import strategies as st
from vllm.utils import cpu_resource_utils
from vllm.utils.cpu_resource_utils import LogicalCPUInfo

from tests.conftest import DESCRIPTION, MICRO
from tests.loading import engine_config
from vllm_w4a4_plugin.platforms import threads
from vllm_w4a4_plugin.platforms.threads import BINDING, Core, as_text, choose, divide, physical_cores


def test_one_hardware_thread_of_each_core() -> None:
    cpus = [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1), (4, 0, 0), (5, 1, 0)]
    assert physical_cores(cpus) == [Core(0, 4), Core(0, 5), Core(1, 2), Core(1, 3)]


@given(cores=st.integers(1, 64), data=st.data())
def test_shares_are_disjoint_equal_and_neighbours(cores: int, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, cores))
    parts = divide([Core(0, cpu) for cpu in range(cores)], ranks)
    assert len(parts) == ranks
    assert len({len(part) for part in parts}) == 1
    flat = [cpu for part in parts for cpu in part]
    assert flat == sorted(set(flat))
    share = cores // ranks
    assert all(part == list(range(i * share, i * share + len(part))) for i, part in enumerate(parts))
    assert all(len(part) == share - (share > 2 and cores > 4) for part in parts)


def test_text_is_that_of_vllm() -> None:
    assert as_text([[0, 1], [2, 3]]) == "0,1|2,3"


@pytest.mark.parametrize(
    ("cores", "ranks", "nodes", "every_core", "chosen"),
    [
        (1, 1, 1, True, None),
        (2, 1, 1, True, "0,1"),
        (4, 1, 1, True, "0,1,2,3"),
        (5, 1, 1, True, None),
        (4, 1, 1, False, None),
        (4, 1, 2, True, None),  # vLLM uses the cores of one node
        (4, 2, 2, True, None),
        (4, 2, 1, False, "0,1|2,3"),
        (8, 2, 1, True, "0,1,2|4,5,6"),
        (2, 3, 1, True, None),
    ],
)
def test_when_a_binding_is_chosen(cores: int, ranks: int, nodes: int, every_core: bool, chosen: str | None) -> None:
    assert choose([Core(0, cpu) for cpu in range(cores)], ranks, nodes, every_core) == chosen


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one NUMA node, before any engine."""
    monkeypatch.setenv(BINDING, "auto")
    monkeypatch.delenv("VLLM_CPU_NUM_OF_RESERVED_CPU", raising=False)
    monkeypatch.setattr(threads, "_chosen", None)
    monkeypatch.setattr(cpu_resource_utils, "get_visible_memory_node", lambda: [0])
    cpus = [LogicalCPUInfo(cpu, cpu, 0) for cpu in range(4)]
    monkeypatch.setattr(cpu_resource_utils, "get_allowed_cpu_list", lambda: cpus)


@pytest.mark.usefixtures("four_cores")
def test_ranks_share_a_node() -> None:
    engine_config(MICRO, tensor_parallel_size=2)
    assert vllm.envs.VLLM_CPU_OMP_THREADS_BIND == "0,1|2,3"
    engine_config(MICRO, tensor_parallel_size=4)
    assert vllm.envs.VLLM_CPU_OMP_THREADS_BIND == "0|1|2|3"
    engine_config(MICRO)
    assert vllm.envs.VLLM_CPU_OMP_THREADS_BIND == "0,1,2,3"


@pytest.mark.usefixtures("four_cores")
def test_ranks_share_a_node_after_an_engine_in_the_same_process() -> None:
    """A running engine makes vLLM keep the variables of its environment as they were."""
    vllm.envs.enable_envs_cache()
    try:
        engine_config(MICRO, tensor_parallel_size=2)
        assert vllm.envs.VLLM_CPU_OMP_THREADS_BIND == "0,1|2,3"
    finally:
        vllm.envs.disable_envs_cache()


@pytest.mark.usefixtures("four_cores")
def test_one_rank_takes_all_of_few_cores(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Unless the user reserves some, or the model is not quantized by us."""
    caplog.set_level("INFO", threads.LOGGER)
    monkeypatch.setattr(threads.logger, "propagate", True)
    engine_config(MICRO)
    assert vllm.envs.VLLM_CPU_OMP_THREADS_BIND == "0,1,2,3"
    assert "Using all 4 cores of this machine" in caplog.text
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")
    engine_config(MICRO)
    assert vllm.envs.VLLM_CPU_OMP_THREADS_BIND == "auto"


@pytest.mark.usefixtures("four_cores")
def test_a_float_model_has_the_cores_that_vllm_gives_it(micro_copy: Path) -> None:
    (micro_copy / DESCRIPTION).unlink()
    engine_config(micro_copy, quantization=None)
    assert vllm.envs.VLLM_CPU_OMP_THREADS_BIND == "auto"


@pytest.mark.usefixtures("four_cores")
def test_the_users_binding_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BINDING, "3|1")
    engine_config(MICRO, tensor_parallel_size=2)
    assert vllm.envs.VLLM_CPU_OMP_THREADS_BIND == "3|1"


@pytest.mark.usefixtures("four_cores")
def test_more_ranks_than_cores_are_left_to_vllm() -> None:
    engine_config(MICRO, tensor_parallel_size=4, pipeline_parallel_size=2)
    assert vllm.envs.VLLM_CPU_OMP_THREADS_BIND == "auto"
