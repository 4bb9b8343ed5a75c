# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU communicator, for ranks on several nodes."""

import socket
from pathlib import Path

import torch.distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

SHARED_MEMORY = Path("/dev/shm")
BOOT = Path("/proc/sys/kernel/random/boot_id")


def shared_memory_identity() -> str:
    """The same text in two processes if and only if they see the same shared memory."""
    try:
        stat = SHARED_MEMORY.stat()
        return f"{BOOT.read_text().strip()} {stat.st_dev} {stat.st_ino}"
    except OSError:
        return socket.gethostname()


class NodeAwareCpuCommunicator(CpuCommunicator):
    """Exchanges tensors over the network where ranks do not share memory.

    vLLM compares only names made of the address where ranks meet, which are the same on all nodes under Ray, and then
    waits forever for ranks to appear in memory that they do not see. Drop this class when vLLM compares the nodes too
    (vllm-project/vllm pull request 46716).
    """

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        found = [""] * self.world_size
        torch.distributed.all_gather_object(found, shared_memory_identity(), group=self.device_group)
        return len(set(found)) == 1 and super()._all_group_ranks_share_shm_group_name()
