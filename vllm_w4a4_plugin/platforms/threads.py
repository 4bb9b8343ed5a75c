# SPDX-License-Identifier: Apache-2.0
"""Which cores each rank's threads are bound to.

vLLM gives each rank a NUMA node of its own and refuses to start with more ranks than nodes. It leaves one core of each
to its scheduler, which is half of a machine with two. Drop the division of a node among ranks when vLLM's
`VLLM_CPU_OMP_THREADS_BIND=auto` does it.
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

FEW_CORES = 4
"""A model is served on all cores of a machine that has no more than these. docs/performance-serving.md has the
measurement, which is of two; three and four were not measured."""

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

    A rank's share leaves one core free for the scheduler, as vLLM's does, but not if the cores are few or it has two.

    Args:
        cores: in order of NUMA nodes.
        ranks: at most as many as there are cores.
    """
    share = len(cores) // ranks
    parts = [[core.cpu for core in cores[rank * share : (rank + 1) * share]] for rank in range(ranks)]
    return [part[:-1] if len(cores) > FEW_CORES and len(part) > 2 else part for part in parts]


def as_text(parts: Sequence[Sequence[int]]) -> str:
    """The value of `VLLM_CPU_OMP_THREADS_BIND`, e.g. `0,1|2,3`."""
    return "|".join(",".join(map(str, part)) for part in parts)


def choose(cores: Sequence[Core], ranks: int, nodes: int, every_core: bool) -> str | None:
    """The value of `VLLM_CPU_OMP_THREADS_BIND` to use, or None to leave the choice to vLLM.

    Args:
        cores: that may be used.
        ranks: on this machine.
        nodes: NUMA nodes that may be used.
        every_core: whether a single rank may take all cores of a small machine.
    """
    is_small = ranks == nodes == 1 and 1 < len(cores) <= FEW_CORES
    if ranks > len(cores):
        return None  # vLLM says what is wrong
    return as_text(divide(cores, ranks)) if ranks > nodes or (every_core and is_small) else None


def bind_ranks(parallel_config: "ParallelConfig", is_ours: bool) -> None:
    """Choose a binding where vLLM would find too few NUMA nodes, or would leave half of a small machine idle.

    One that the user has set stays, and so does a number of reserved cores.

    Args:
        is_ours: whether the model is quantized by our method. Others have the cores that vLLM gives them.
    """
    global _chosen
    import vllm.envs  # these import the platform, which imports this
    from vllm.utils import cpu_resource_utils

    # An engine that runs in this process has left vLLM with copies of the variables as they were then. The new engine
    # makes new ones.
    vllm.envs.disable_envs_cache()
    if vllm.envs.VLLM_CPU_OMP_THREADS_BIND not in (AUTO, _chosen):
        return
    if _chosen is not None:  # by an engine that this process made before
        envs.assign(BINDING, AUTO)
        _chosen = None
    ranks = parallel_config.local_world_size * parallel_config.data_parallel_size_local
    nodes = len(cpu_resource_utils.get_visible_memory_node())
    allowed = cpu_resource_utils.get_allowed_cpu_list()
    cores = physical_cores([(cpu.id, cpu.physical_core, cpu.numa_node) for cpu in allowed])
    is_alone = parallel_config.world_size_across_dp == 1
    _chosen = choose(cores, ranks, nodes, is_ours and is_alone and vllm.envs.VLLM_CPU_NUM_OF_RESERVED_CPU is None)
    if _chosen is None:
        return
    envs.assign(BINDING, _chosen)
    if ranks > nodes:
        logger.info(
            "%d ranks share the NUMA nodes of this machine: using %s='%s'. Set it to choose other cores.",
            ranks,
            BINDING,
            _chosen,
        )
    else:
        logger.info(
            "Using all %d cores of this machine (%s='%s'). VLLM_CPU_NUM_OF_RESERVED_CPU=1 leaves one to vLLM's "
            "scheduler.",
            len(cores),
            BINDING,
            _chosen,
        )
