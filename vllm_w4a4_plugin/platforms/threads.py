# SPDX-License-Identifier: Apache-2.0
"""Which cores each rank's threads are bound to.

vLLM gives each rank a NUMA node of its own and refuses to start with more ranks than nodes.
Drop this when vLLM's `VLLM_CPU_OMP_THREADS_BIND=auto` divides a node among ranks.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.constants import LOGGER

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

logger = logging.getLogger(LOGGER)

BINDING = "VLLM_CPU_OMP_THREADS_BIND"
AUTO = "auto"

_chosen: str | None = None


@dataclass(frozen=True, order=True)
class Core:
    """A physical core.

    Attributes:
        node: its NUMA node.
        cpu: number of the logical CPU to use of it.
    """

    node: int
    cpu: int


def physical_cores(cpus: Sequence[tuple[int, int, int]]) -> list[Core]:
    """One logical CPU of each physical core, in order of NUMA nodes.

    Args:
        cpus: (logical CPU, physical core, NUMA node) of those that may be used.
    """
    last: dict[tuple[int, int], int] = {}
    for cpu, core, node in sorted(cpus):
        last[node, core] = cpu  # of two hardware threads the second, like vLLM
    return sorted(Core(node, cpu) for (node, _), cpu in last.items())


def divide(cores: Sequence[Core], ranks: int) -> list[list[int]]:
    """The logical CPUs of each rank: equal shares of neighbouring cores.

    A rank's share leaves one core free for the scheduler, as vLLM's does, if it has more than one.

    Args:
        cores: in order of NUMA nodes.
        ranks: at most as many as there are cores.
    """
    share = len(cores) // ranks
    parts = [[core.cpu for core in cores[rank * share : (rank + 1) * share]] for rank in range(ranks)]
    return [part[:-1] if len(part) > 2 else part for part in parts]


def as_text(parts: Sequence[Sequence[int]]) -> str:
    """The value of `VLLM_CPU_OMP_THREADS_BIND`, e.g. `0,1|2,3`."""
    return "|".join(",".join(map(str, part)) for part in parts)


def bind_ranks(parallel_config: "ParallelConfig") -> None:
    """Choose a binding where vLLM would find too few NUMA nodes; one that the user has set stays."""
    global _chosen
    import vllm.envs  # these import the platform, which imports this
    from vllm.utils import cpu_resource_utils

    ranks = parallel_config.local_world_size * parallel_config.data_parallel_size_local
    if vllm.envs.VLLM_CPU_OMP_THREADS_BIND not in (AUTO, _chosen):
        return
    if _chosen is not None:  # by an engine that this process made before
        envs.assign(BINDING, AUTO)
        _chosen = None
    if ranks <= len(cpu_resource_utils.get_visible_memory_node()):
        return
    allowed = cpu_resource_utils.get_allowed_cpu_list()
    cores = physical_cores([(cpu.id, cpu.physical_core, cpu.numa_node) for cpu in allowed])
    if ranks > len(cores):
        return  # vLLM says what is wrong
    _chosen = as_text(divide(cores, ranks))
    envs.assign(BINDING, _chosen)
    logger.info(
        "%d ranks share the NUMA nodes of this machine: using %s='%s'. Set it to choose other cores.",
        ranks,
        BINDING,
        _chosen,
    )
