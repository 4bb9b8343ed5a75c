# SPDX-License-Identifier: Apache-2.0
"""The model in the engine's own process, where one rank is enough.

On CPUs vLLM starts a process of its own for every rank, because OpenMP binds its threads by variables that it reads
when a process starts, and the engine's process has started by then. Where there is one rank, the variables can be set
before that, and the engine's process computes too. A server is ready earlier by the time in which a process imports
vLLM, and no step waits for messages between the two.
Drop this when vLLM's CPU platform runs a single rank in the engine's process itself.
"""

from typing import TYPE_CHECKING

from vllm_w4a4_plugin import envs

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

ONE_PROCESS, PROCESS_PER_RANK = "uni", "mp"

_assigned: dict[str, str | None] = {}
"""Variables that this process has set for an engine, with their former values."""


def is_one_process_possible(vllm_config: "VllmConfig") -> bool:
    """Whether a single rank computes and vLLM, not the user, has chosen how to run it."""
    parallel: ParallelConfig = vllm_config.parallel_config
    return (
        parallel.distributed_executor_backend == ONE_PROCESS
        and parallel.world_size == 1
        and parallel.data_parallel_size == 1
        and vllm_config.kv_transfer_config is None
    )


def bind_this_engine(vllm_config: "VllmConfig") -> None:
    """Let the engine's process, which inherits this one's environment, bind its threads as vLLM would bind a rank's.

    Args:
        vllm_config: of an engine with one rank, after vLLM's platform has checked it.
    """
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    before = envs.snapshot()
    with OMPProcessManager(vllm_config).configure_omp_envs(rank=0, local_rank=0):
        chosen = {name: value for name, value in envs.snapshot().items() if before.get(name) != value}
    for name, value in chosen.items():
        _assigned.setdefault(name, before.get(name))
        envs.assign(name, value)
    vllm_config.parallel_config.distributed_executor_backend = ONE_PROCESS


def forget_last_engine() -> None:
    """Put back the variables that were set for the engine before."""
    for name, value in _assigned.items():
        envs.assign(name, value)
    _assigned.clear()
