# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 doctor --device-check [MODEL]`: run the operators of a model on this machine's NPU."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

EXIT_CODES = """\
exit codes of --device-check:
  0  everything passed
  1  CANN's operators, graphs or the environment failed: do not serve with the plugin here
  2  wrong arguments
  3  only the fused library failed: serve with VLLM_W4A4_NPU_FUSED=0
  4  no NPU could be used
"""

REPORT = Path("w4a4-device-check.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the check to those of `doctor`."""
    group = parser.add_argument_group("device check")
    group.add_argument(
        "--device-check",
        action="store_true",
        help="compare every operator that MODEL needs with the reference on this machine's NPU, in about a minute; "
        "without MODEL with the sizes of Qwen3-32B",
    )
    group.add_argument("--npu", default="npu:0", metavar="DEVICE", help="device to check (default: npu:0)")
    group.add_argument(
        "--report", type=Path, default=REPORT, metavar="FILE", help=f"JSON file to write (default: {REPORT})"
    )


def run(args: argparse.Namespace, worker: Sequence[str] = (), limit: float | None = None) -> int:
    """Check, print one line per step, write the report; returns an exit code of `report`.

    Args:
        args: of the command line.
        worker: command of a worker process, by default that of `run`.
        limit: seconds for each step instead of those of the plan.
    """
    from dataclasses import replace

    from vllm_w4a4_plugin.capacity.versions import found_versions
    from vllm_w4a4_plugin.device_check import environment, report
    from vllm_w4a4_plugin.device_check.outcome import Outcome
    from vllm_w4a4_plugin.device_check.plan import Step, make_plan
    from vllm_w4a4_plugin.device_check.plan_experts import expert_steps
    from vllm_w4a4_plugin.device_check.run import WORKER, Result, run_plan

    layers, experts = _layers(args)
    steps = [*make_plan(layers, has_fused_library=_has_fused_library()), *expert_steps(experts)]
    if limit is not None:
        steps = [replace(step, limit=limit) for step in steps]
    found: dict[str, Outcome] = {
        **dict(environment.version_outcomes(found_versions())),
        "set_env.sh": environment.set_env_outcome(),
    }
    print(f"{args.model or 'sizes of Qwen3-32B'} on {args.npu}: {len(steps)} steps")
    for title, outcome in found.items():
        print(report.line(title, outcome))

    def begin(step: Step) -> None:
        if sys.stdout.isatty():
            print(f"...     {report.title_of(step)}"[:80], end="\r", flush=True)

    def end(result: Result) -> None:
        clear = "\x1b[K" if sys.stdout.isatty() else ""
        print(f"{clear}{report.line(report.title_of(result.step), result.outcome)}", flush=True)

    results = run_plan(steps, args.npu, begin, end, worker or WORKER)
    code = report.exit_code(found.values(), results)
    content = report.as_json(str(args.model or ""), args.tensor_parallel_size, found, results, code)
    args.report.write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(f"{report.VERDICTS[code]}\nReport: {args.report.resolve()}. Please attach it to an issue.")
    return code


def _layers(args: argparse.Namespace) -> tuple[list, list]:
    """The kinds of W4A4 linear layers and of W4A4 experts."""
    from vllm_w4a4_plugin.capacity.experts import on_expert_parallel_rank
    from vllm_w4a4_plugin.capacity.model import read_model
    from vllm_w4a4_plugin.checkpoint import CheckpointError
    from vllm_w4a4_plugin.device_check.plan import default_layers, layers_on_rank
    from vllm_w4a4_plugin.device_check.plan_experts import expert_layers

    if args.model is None:
        return default_layers(), []
    model, ranks = read_model(args.model, args.recipe), args.tensor_parallel_size
    if args.enable_expert_parallel and model.experts:
        model = on_expert_parallel_rank(model, ranks)
    layers, experts = layers_on_rank(model, ranks), expert_layers(model, ranks)
    if not layers and not experts:
        raise CheckpointError(
            f"{args.model} has no W4A4 linear layers and no W4A4 experts: the plugin would compute nothing on an NPU."
        )
    return layers, experts


def _has_fused_library() -> bool:
    """Whether the library is installed and wanted; if it cannot be loaded, the check says why."""
    from vllm_w4a4_plugin import envs
    from vllm_w4a4_plugin.ops.npu.fused import library_file

    return envs.VLLM_W4A4_NPU_FUSED and library_file() is not None
