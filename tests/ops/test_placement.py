# SPDX-License-Identifier: Apache-2.0
"""Packed weights are placed where they are touched first, also where the memory of the process is interleaved."""

import ctypes
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_w4a4_plugin.ops import packing
from vllm_w4a4_plugin.ops.layout import packed_int4_shape, packed_int8_shape

NUMBERS = {"x86_64": (238, 239), "aarch64": (237, 236)}
"""Of the system calls set_mempolicy and get_mempolicy."""

DEFAULT, INTERLEAVE, LOCAL, OF_ADDRESS = 0, 3, 4, 2


def system_call(number: int, *arguments: object) -> int:
    return ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)


def policy_of(address: int | None) -> int:
    """The policy of its own for the page at an address, or that of the process; -1 if the kernel does not tell."""
    mode, nothing = ctypes.c_int(-1), ctypes.c_ulong(0)
    flags = ctypes.c_ulong(0 if address is None else OF_ADDRESS)
    system_call(NUMBERS[platform.machine()][1], ctypes.byref(mode), None, nothing, ctypes.c_void_p(address), flags)
    return mode.value


def policies_in_an_interleaved_process() -> None:
    """Prints the policies of a packed weight's memory, of other memory and of the process."""
    nodes = ctypes.c_ulong(1)
    system_call(NUMBERS[platform.machine()][0], INTERLEAVE, ctypes.byref(nodes), ctypes.c_ulong(64))
    weight = packing.zeros(packed_int4_shape(4096, 4096), torch.uint8)
    other = torch.zeros(8 << 20, dtype=torch.uint8)
    places = (tensor.data_ptr() + tensor.numel() // 2 for tensor in (weight, other))
    print(*map(policy_of, (*places, None)))


@pytest.mark.skipif(platform.machine() not in NUMBERS, reason="numbers of system calls are not known here")
def test_memory_of_weights_is_not_interleaved() -> None:
    code = f"from {__name__} import *; policies_in_an_interleaved_process()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    weight, other, process = map(int, result.stdout.split())
    if process != INTERLEAVE:
        pytest.skip("this kernel or container allows no policy for memory")
    assert weight == LOCAL
    assert other == DEFAULT


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this kernel has no huge pages")
def test_huge_pages_are_asked_for() -> None:
    weight = packing.zeros(packed_int4_shape(4096, 4096), torch.uint8)
    address, found = weight.data_ptr() + weight.numel() // 2, ""
    is_here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif is_here and line.startswith("VmFlags:"):
            found = line
    assert "hg" in found.split()


@pytest.mark.parametrize("shape", [packed_int4_shape(40, 77), packed_int8_shape(40, 77), packed_int4_shape(4096, 512)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_all_bytes_are_zero(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for _ in range(3):  # memory that was used before
        weight = packing.zeros(shape, dtype)
        assert weight.shape == shape
        assert weight.dtype is dtype
        assert not weight.any()
        weight.fill_(7)


def test_another_form_is_refused() -> None:
    packing.zeros(packed_int4_shape(40, 77), torch.uint8)
    with pytest.raises(RuntimeError, match=r"packed: expected bytes \[tiles, blocks, bytes of a block\]"):
        torch.ops.vllm_w4a4.zero_tiles_(torch.empty(4, 8, dtype=torch.uint8))


def test_a_weight_that_is_only_described_stays_so() -> None:
    with torch.device("meta"):
        assert packing.zeros(packed_int4_shape(40, 77), torch.uint8).is_meta


def test_more_threads_than_cores() -> None:
    """Four threads pack and multiply on however many cores there are."""
    from vllm_w4a4_plugin.ops import api

    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (1000, 512), dtype=torch.int8, generator=generator)
    x = torch.randn(3, 512, generator=generator)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            packed = packing.zeros(packed_int4_shape(1000, 512), torch.uint8)
            packing.pack_int4_rows_(packed, weight[:300].contiguous(), 0)
            packing.pack_int4_rows_(packed, weight[300:].contiguous(), 300)
            assert torch.equal(packing.unpack_int4(packed, 1000, 512), weight)
            results.append(api.flatquant_linear(x, packed, torch.ones(1000), None, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
