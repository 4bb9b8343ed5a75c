# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 inspect DIR`: what a checkpoint contains, also where it cannot be run or is damaged."""

import argparse
import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.layers import LayerState, layer_states
from vllm_w4a4_plugin.checkpoint.runnable import Kind
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.text import format_table

HEADER = ("linear", "quant type", "out x in", "transform", "groups", "layers", "remark")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command's arguments."""
    parser = subparsers.add_parser("inspect", help="show what a checkpoint contains")
    parser.add_argument("directory", help="checkpoint directory")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print a summary by quantization type; returns 1 if the description or the headers of a layer are wrong."""
    reader = CheckpointReader(args.directory)
    layers = list(layer_states(Inventory.of(reader)))
    faulty = any(layer.fault for layer in layers)
    total = sum(info.nbytes for info in reader.tensors.values())
    if args.json:
        summary: dict[str, Any] = {
            "directory": str(reader.directory),
            "architectures": reader.config.get("architectures") if reader.has_config else None,
            "total_bytes": total,
            "linear_layers": [_json(layer) for layer in layers],
        }
        print(json.dumps(summary, indent=2))
        return int(faulty)
    rows = [(*cells[:-1], str(count), cells[-1]) for cells, count in Counter(map(_cells, layers)).items()]
    print(format_table(HEADER, rows))
    print(f"\n{len(reader.tensors)} tensors in {len({i.file for i in reader.tensors.values()})} files, {total:,} bytes")
    return int(faulty)


def _cells(layer: LayerState) -> tuple[str, ...]:
    """The row of a layer; layers with equal rows are counted in one."""
    spec = layer.plan.spec if layer.plan is not None else None
    leaf = layer.name.rpartition(".")[2]
    return (
        f"experts' {leaf}" if layer.kind is Kind.EXPERTS else leaf,
        layer.written_type,
        " x ".join(map(str, layer.shape)),
        _transform(spec),
        str(spec.groups) if spec is not None else "",
        layer.fault or _short(layer),
    )


def _short(layer: LayerState) -> str:
    if not layer.unsupported:
        return ""
    what = "" if layer.kind is Kind.LINEAR else f"{layer.kind} of this type "
    return f"{what}cannot be run on CPU; `vllm-w4a4 verify` says what can"


def _transform(spec: LinearSpec | None) -> str:
    if spec is None or not spec.quant_type.spec.has_transform:
        return ""
    return " x ".join("I" if size is None else str(size) for size in (spec.left, spec.right))


def _json(layer: LayerState) -> dict[str, Any]:
    """The layer with the key names of the command's JSON output, which are older than `LinearSpec`'s; null: unknown."""
    names = {"output_size": "out_features", "input_size": "in_features"}
    spec = layer.plan.spec if layer.plan is not None else None
    if spec is not None:
        known = {names.get(key, key): value for key, value in asdict(spec).items()}
    else:
        rows, columns = layer.shape if len(layer.shape) == 2 else (None, None)
        known = {"name": layer.name, "quant_type": layer.written_type, "out_features": rows, "in_features": columns}
    return {
        **known,
        "kind": layer.kind.value,
        "problem": layer.fault or layer.unsupported,
        "is_faulty": bool(layer.fault),
    }
