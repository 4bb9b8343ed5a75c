# SPDX-License-Identifier: Apache-2.0
"""Ranks use shared memory only where all of them see the same."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from vllm.platforms import current_platform

from vllm_w4a4_plugin.platforms import communicator
from vllm_w4a4_plugin.platforms.communicator import NodeAwareCpuCommunicator, shared_memory_identity


def test_the_platform_names_it() -> None:
    module, _, name = current_platform.get_device_communicator_cls().rpartition(".")
    assert (module, name) == (NodeAwareCpuCommunicator.__module__, NodeAwareCpuCommunicator.__name__)


def test_another_shared_memory_or_boot_is_another_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {shared_memory_identity(), shared_memory_identity()}
    assert len(found) == 1
    monkeypatch.setattr(communicator, "SHARED_MEMORY", tmp_path)
    found.add(shared_memory_identity())
    (tmp_path / "boot_id").write_text("another")
    monkeypatch.setattr(communicator, "BOOT", tmp_path / "boot_id")
    found.add(shared_memory_identity())
    monkeypatch.setattr(communicator, "SHARED_MEMORY", tmp_path / "none")
    found.add(shared_memory_identity())
    assert len(found) == 4


@pytest.mark.parametrize(("other", "shared"), [(None, True), ("another node", False)])
def test_a_rank_elsewhere(monkeypatch: pytest.MonkeyPatch, other: str | None, shared: bool) -> None:
    """`other` is what the second rank says of itself; the names that vLLM compares are always the same."""
    monkeypatch.setenv("VLLM_DIST_IDENT", "29500")

    def gather(found: list[Any], mine: Any, group: Any) -> None:
        names_are_compared = str(mine).startswith("29500")
        found[:] = [mine, mine if other is None or names_are_compared else other]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    rank = object.__new__(NodeAwareCpuCommunicator)
    rank.world_size, rank.ranks, rank.unique_name, rank.device_group = 2, [0, 1], "tp:0", None
    assert rank._all_group_ranks_share_shm_group_name() is shared
