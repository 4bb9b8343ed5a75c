# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 doctor MODEL`: whether a model fits an NPU, which kernels its layers get, and bounds of step times."""

import argparse
import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_w4a4_plugin.text import format_table

from . import device_check

STEPS = (1, 16, 64, 256, 1024, 4096)
"""Tokens per step in the table of times."""

FINDINGS = 10
"""Shown of a checkpoint that would be refused."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command's arguments."""
    parser = subparsers.add_parser(
        "doctor",
        help="show whether a model fits an NPU, its kernels and lower bounds of step times; check an NPU",
        epilog=device_check.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, nargs="?", help="checkpoint directory, or one with a config.json alone")
    parser.add_argument("--device", default="910B2", help="910B1, 910B2, 910B3 or 910_93 (default: 910B2)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="devices (default: 1)")
    parser.add_argument(
        "--enable-expert-parallel", action="store_true", help="each device has whole experts, not a part of every one"
    )
    parser.add_argument("--max-model-len", type=int, default=4096, help="tokens per sequence (default: 4096)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192, help="tokens per step (default: 8192)")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="vLLM's (default: 0.9)")
    parser.add_argument(
        "--recipe",
        default="tutorial",
        help="quant types of a model without weights, as in `quantize` (default: tutorial)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    device_check.add_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns 0 if the model fits and every layer has a kernel, else 1."""
    from vllm_w4a4_plugin.capacity.devices import find_device
    from vllm_w4a4_plugin.capacity.experts import on_expert_parallel_rank
    from vllm_w4a4_plugin.capacity.kernels import kernels_of
    from vllm_w4a4_plugin.capacity.memory import Serving, plan_memory
    from vllm_w4a4_plugin.capacity.model import is_checkpoint, read_model
    from vllm_w4a4_plugin.capacity.roofline import step_time
    from vllm_w4a4_plugin.capacity.versions import found_versions
    from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
    from vllm_w4a4_plugin.checkpoint.runnable import ON_NPU
    from vllm_w4a4_plugin.checkpoint.verify import header_findings, shared_value_findings
    from vllm_w4a4_plugin.ops.npu.select import Kernel

    ranks = args.tensor_parallel_size
    if ranks < 1 or args.max_model_len < 1 or args.max_num_batched_tokens < 1:
        raise CheckpointError("--tensor-parallel-size, --max-model-len and --max-num-batched-tokens must be at least 1")
    if args.device_check:
        return device_check.run(args)
    if args.model is None:
        raise CheckpointError("doctor needs a directory, or --device-check to check this machine's NPU")
    if not 0 < args.gpu_memory_utilization <= 1:
        raise CheckpointError(f"--gpu-memory-utilization must be in (0, 1], found {args.gpu_memory_utilization}")
    device = find_device(args.device)
    reader = CheckpointReader(args.model)
    if is_checkpoint(reader):
        findings = list(header_findings(reader, ON_NPU))
        if not findings and find_spec("torch") is not None:  # values cannot be read without it
            findings = list(shared_value_findings(reader, ON_NPU))
        if findings:
            return _refuse(findings, args)
    model = read_model(args.model, args.recipe)
    if args.enable_expert_parallel and model.experts:
        model = on_expert_parallel_rank(model, ranks)
    serving = Serving(ranks, args.gpu_memory_utilization, args.max_model_len, args.max_num_batched_tokens)
    memory = plan_memory(model, device, serving)
    kernels = list(kernels_of(model, ranks))
    steps = [step_time(model, device, memory, ranks, tokens, args.max_model_len) for tokens in STEPS]
    problems = [f"{k.layers}: {k.reason}" for k in kernels if k.kernel == Kernel.NONE]
    if memory.kv_tokens < serving.max_model_len:
        problems.append(
            f"the KV cache would hold {memory.kv_tokens} tokens, but a sequence has {serving.max_model_len}: "
            "use more devices, a shorter --max-model-len or fewer --max-num-batched-tokens"
        )
    facts: dict[str, Any] = {
        "source": model.source,
        "device": device.name,
        "tensor_parallel_size": ranks,
        "fits": not problems,
        "problems": problems,
        "stored_bytes": model.stored_bytes,
        "memory": {**asdict(memory), "total_weights": memory.total_weights, "kv_tokens": memory.kv_tokens},
        "kernels": [asdict(kernel) for kernel in kernels],
        "steps": [{**asdict(step), "total": step.total} for step in steps],
        "versions": found_versions(),
    }
    print(json.dumps(facts, indent=2) if args.json else _report(facts, args))
    return 1 if problems else 0


def _refuse(findings: list[str], args: argparse.Namespace) -> int:
    """A checkpoint that would not be served, whatever the device: what `verify` says of it, for NPUs."""
    if args.json:
        print(json.dumps({"source": str(args.model), "fits": False, "problems": findings}, indent=2))
    else:
        shown = "\n".join(f"  - {finding}" for finding in findings[:FINDINGS])
        more = f"\n  and {len(findings) - FINDINGS} more" if findings[FINDINGS:] else ""
        print(f"{args.model}\nIt would be refused:\n{shown}{more}")
    return 1


def _report(facts: dict[str, Any], args: argparse.Namespace) -> str:
    memory = facts["memory"]
    verdict = "It fits." if facts["fits"] else "It does not fit:\n" + "\n".join(f"  - {p}" for p in facts["problems"])
    weights = [(kind, _gb(size)) for kind, size in memory["weights"].items()]
    sizes = [
        ("weights", _gb(memory["total_weights"]), ""),
        ("activations of a step", _gb(memory["activations"]), "estimate"),
        ("KV cache", _gb(memory["kv_left"]), _kv_remark(memory, args.max_model_len)),
        ("peak while loading", _gb(memory["loading_peak"]), _loading_remark(memory)),
        ("files of the checkpoint", _gb(facts["stored_bytes"]), ""),
    ]
    kernels = [(k["layers"], k["quant_type"], str(k["count"]), k["kernel"], k["reason"]) for k in facts["kernels"]]
    steps = [
        (
            str(step["tokens"]),
            str(step["sequences"]),
            *(f"{1e3 * step[part]:.1f}" for part in ("linears", "head", "kv_cache", "total")),
            f"{1e3 * step['total'] / step['tokens']:.3f}",
        )
        for step in facts["steps"]
    ]
    return "\n".join(
        (
            f"{facts['source']}, on {facts['tensor_parallel_size']} x {facts['device']}",
            verdict,
            "\nWeights on each device",
            format_table(("quant type", "GB"), weights),
            "\nMemory on each device",
            format_table(("", "GB", "remark"), sizes),
            "\nKernels",
            format_table(("layers", "quant type", "count", "kernel", "why"), kernels),
            "If the project's fused library can be loaded, it is preferred; the start-up table shows what runs.",
            f"\nLower bounds of a step, ms (KV cache of {args.max_model_len} tokens per sequence; no communication)",
            format_table(("tokens", "sequences", "linears", "output head", "KV cache", "step", "per token"), steps),
            "\nVersions",
            format_table(("component", "found"), facts["versions"].items()),
        )
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _kv_remark(memory: dict[str, Any], length: int) -> str:
    tokens = memory["kv_tokens"]
    return f"{tokens} tokens of {memory['kv_per_token'] / 1024:.0f} KiB, {tokens / length:.1f} sequences of {length}"


def _loading_remark(memory: dict[str, Any]) -> str:
    if memory["unpacked_peak"] == memory["total_weights"]:
        return ""
    return f"int4 weights are packed tensor by tensor; unpacked: {_gb(memory['unpacked_peak'])}"
