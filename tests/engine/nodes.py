# SPDX-License-Identifier: Apache-2.0
"""Two nodes on one machine: each has a network and shared memory of its own. Needs root and `ip` (iproute2)."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

USABLE = os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("curl") is not None
WHY_NOT = "nodes are network namespaces: needs root, ip and curl (Debian, Ubuntu: apt-get install iproute2 curl)"

CABLE = "cable0"
"""The interface of each node; two ends of one cable may have the same name in two namespaces."""


@dataclass(frozen=True)
class Node:
    """One of the two.

    Attributes:
        namespace: the name of its network.
        address: in the network that both are in.
        directory: of its files; `shm` in it is what processes on it see as /dev/shm.
        cores: that vLLM's ranks on it use.
    """

    namespace: str
    address: str
    directory: Path
    cores: str

    @property
    def inside(self) -> list[str]:
        """The words before a command that is to run on this node."""
        # `ip netns exec` makes a namespace of mounts too, so this one is seen by the command only.
        script = f'mount --bind {self.directory}/shm /dev/shm && exec "$@"'
        variables = {"VLLM_HOST_IP": self.address, "GLOO_SOCKET_IFNAME": CABLE}
        variables["VLLM_CPU_OMP_THREADS_BIND"] = self.cores
        assignments = [f"{name}={value}" for name, value in variables.items()]
        return ["ip", "netns", "exec", self.namespace, "sh", "-c", script, "sh", "env", *assignments]

    def processes(self) -> list[int]:
        """Of all that was started on the node."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], check=True, capture_output=True, text=True)
        return [int(line) for line in listed.stdout.split()]


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Their ranks are on different cores where there are two. All that still runs on them at the end is killed."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        nodes = [
            Node(f"w4a4-{os.getpid()}-{i}", f"10.77.0.{i + 1}", Path(directory) / str(i), str(cores[i % len(cores)]))
            for i in range(2)
        ]
        first, second = nodes
        made: list[Node] = []
        try:
            for node in nodes:
                (node.directory / "shm").mkdir(parents=True)
                _ip("netns", "add", node.namespace)
                made.append(node)
            ends = ["netns", first.namespace, "type", "veth", "peer", "name", CABLE, "netns", second.namespace]
            _ip("link", "add", CABLE, *ends)
            for node in nodes:
                for interface in ("lo", CABLE):
                    _ip("-n", node.namespace, "link", "set", interface, "up")
                _ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", CABLE)
            yield first, second
        finally:
            for node in made:
                _end(node)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _end(node: Node) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in node.processes():
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + 10
        while node.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
    _ip("netns", "delete", node.namespace)
