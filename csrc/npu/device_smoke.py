# SPDX-License-Identifier: Apache-2.0
"""First run of the NPU kernels on a device: conformance, then timings.

    python csrc/npu/device_smoke.py --library path/to/libvllm_w4a4_npu.so [--shapes quick|all]

Needs torch_npu, an Atlas A2 or A3 and this package. The kernels have only been emulated so far, so expect to learn
something. Order: one small linear of each kind first (a hang here is a synchronization fault: run under `timeout`),
then every token count at which another kernel takes over, then the Qwen3-32B linears with times. Data are small
integers, for which every sum is exact in float32 whatever its order: results must agree bit for bit. Exit status 1
after any difference.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_w4a4_plugin.ops.npu.nz import pack_nz
from vllm_w4a4_plugin.ops.reference import int4_linear, kronecker_transform

QWEN3_32B = {
    "qkv": (5120, 10240, 64, 80),
    "o": (8192, 5120, 64, None),
    "gate_up": (5120, 51200, 64, 80),
    "down": (25600, 5120, 160, 160),
}
# Where another token class, a second tile or the grid barrier begins.
TOKEN_COUNTS = [1, 2, 8, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 200, 300]
SMALLEST_MAXIMUM = 2.0**-100


@dataclass(frozen=True)
class Linear:
    """Operands on the CPU; left_trans, right_trans are None where the linear has no such factor."""

    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    left_trans: Tensor | None
    right_trans: Tensor | None
    clip_ratio: float
    bias: Tensor | None

    def on(self, device: str) -> tuple[Tensor | float | None, ...]:
        """The operator's arguments."""
        tensors = (self.x, pack_nz(self.weight), self.weight_scale.T.contiguous(), self.left_trans, self.right_trans)
        moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
        return *moved, self.clip_ratio, None if self.bias is None else self.bias.to(device)


def make_linear(
    tokens: int,
    in_features: int,
    out_features: int,
    left: int | None,
    right: int | None,
    dtype: torch.dtype,
    groups: int = 1,
    clip_ratio: float = 1.0,
    bias: bool = False,
) -> Linear:
    """A linear of small random integers."""
    generator = torch.Generator().manual_seed(tokens + in_features)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    return Linear(
        x=integers(-9, 9, tokens, in_features).to(dtype),
        weight=integers(-8, 7, out_features, in_features).to(torch.int8),
        weight_scale=torch.rand(out_features, groups, generator=generator) * 0.02,
        left_trans=None if left is None else integers(-2, 2, left, left).to(dtype),
        right_trans=None if right is None else integers(-2, 2, right, right).to(dtype),
        clip_ratio=clip_ratio,
        bias=torch.rand(out_features, generator=generator) if bias else None,
    )


def expected(linear: Linear) -> Tensor:
    """What the kernels compute, operation for operation; the scales of several groups in another order."""
    dtype = linear.x.dtype
    z = kronecker_transform(linear.x.float(), None, _float(linear.right_trans))
    if linear.left_trans is not None:
        z = kronecker_transform(z.to(dtype).float(), _float(linear.left_trans), None)
    largest = z.abs().amax(-1)
    seven, clip = torch.tensor(7.0), torch.tensor(linear.clip_ratio)
    q = (z * (seven / clip / largest.clamp(min=SMALLEST_MAXIMUM))[:, None]).round().clamp(-8, 7).to(torch.int8)
    scale = largest * (clip / seven)
    return int4_linear(q, scale, linear.weight, linear.weight_scale, linear.bias, None, dtype)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def cases(shapes: str) -> Iterator[tuple[str, Linear]]:
    """Named linears, the simplest first."""
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for tokens in (1, 40):
            for left, right in ((None, None), (16, None), (None, 24), (16, 24)):
                label = f"{name} {tokens} tokens 384 = {left} x {right}"
                yield label, make_linear(tokens, 384, 80, left, right, dtype, bias=True)
    for tokens in TOKEN_COUNTS:
        yield f"{tokens} tokens", make_linear(tokens, 5120, 1030, 64, 80, torch.bfloat16, clip_ratio=0.75)
    yield "4 groups", make_linear(20, 1024, 300, 32, 32, torch.bfloat16, groups=4)
    for label, (in_features, out_features, left, right) in QWEN3_32B.items():
        for tokens in (1, 64) if shapes == "quick" else (1, 64, 1024):
            yield (
                f"{label} {tokens} tokens",
                make_linear(tokens, in_features, out_features, left, right, torch.bfloat16),
            )


def compare(label: str, found: Tensor, wanted: Tensor, exact: bool) -> bool:
    """Prints the first difference. Not `exact`: one unit in the last place may differ."""
    if exact:
        different = found != wanted
    else:
        different = (found.float() - wanted.float()).abs() > torch.finfo(found.dtype).eps * wanted.float().abs()
    count = int(different.sum())
    if count:
        first = tuple(different.nonzero()[0].tolist())
        print(f"FAILED {label}: {count} of {found.numel()} differ, first {first}: {found[first]} for {wanted[first]}")
    else:
        print(f"ok     {label}")
    return count == 0


def time_linear(linear: Linear, device: str, repeats: int = 50) -> float:
    """Microseconds a call, back to back, by events on the device."""
    arguments = linear.on(device)
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        torch.ops.vllm_w4a4_npu.flatquant_linear(*arguments)
    start.record()
    for _ in range(repeats):
        torch.ops.vllm_w4a4_npu.flatquant_linear(*arguments)
    end.record()
    torch.npu.synchronize()
    return float(start.elapsed_time(end)) * 1000 / repeats


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="libvllm_w4a4_npu.so")
    parser.add_argument("--device", default="npu:0")
    parser.add_argument("--shapes", choices=["quick", "all"], default="quick")
    options = parser.parse_args()
    import torch_npu  # noqa: F401  registers the device

    torch.ops.load_library(options.library)
    failures = 0
    for label, linear in cases(options.shapes):
        found = torch.ops.vllm_w4a4_npu.flatquant_linear(*linear.on(options.device)).cpu()
        failures += not compare(label, found, expected(linear), exact=linear.weight_scale.shape[1] == 1)
    if failures:
        print(f"{failures} linears differ; no timings")
        return 1
    for label, shape in QWEN3_32B.items():
        for tokens in (1, 64, 256, 1024, 4096):
            microseconds = time_linear(make_linear(tokens, *shape, torch.bfloat16), options.device)
            print(f"{label:8} {tokens:5} tokens {microseconds:9.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
