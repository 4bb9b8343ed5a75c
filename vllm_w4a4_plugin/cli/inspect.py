# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 inspect DIR`: what a checkpoint contains."""

import argparse
import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.plan import plan_layer
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.checkpoint.verify import linear_modules
from vllm_w4a4_plugin.text import format_table


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command's arguments."""
    parser = subparsers.add_parser("inspect", help="show what a checkpoint contains")
    parser.add_argument("directory", help="checkpoint directory")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print a summary by quantization type."""
    reader = CheckpointReader(args.directory)
    inventory = Inventory.of(reader)
    plans = (plan_layer(name, inventory, {}) for name in linear_modules(inventory))
    layers = [plan.spec for plan in plans if plan.spec is not None]
    if args.json:
        summary: dict[str, Any] = {
            "directory": str(reader.directory),
            "architectures": reader.config.get("architectures"),
            "total_bytes": sum(info.nbytes for info in reader.tensors.values()),
            "linear_layers": [_json(layer) for layer in layers],
        }
        print(json.dumps(summary, indent=2))
        return 0
    kinds = Counter(
        (layer.leaf, layer.quant_type.value, f"{layer.output_size} x {layer.input_size}", _transform(layer),
         str(layer.groups))
        for layer in layers
    )  # fmt: skip
    rows = [(*kind, str(count)) for kind, count in kinds.items()]
    print(format_table(("linear", "quant type", "out x in", "transform", "groups", "layers"), rows))
    total = sum(info.nbytes for info in reader.tensors.values())
    print(f"\n{len(reader.tensors)} tensors in {len({i.file for i in reader.tensors.values()})} files, {total:,} bytes")
    return 0


def _transform(layer: LinearSpec) -> str:
    if not layer.quant_type.spec.has_transform:
        return ""
    return " x ".join("I" if size is None else str(size) for size in (layer.left, layer.right))


def _json(layer: LinearSpec) -> dict[str, Any]:
    """The layer with the key names of the command's JSON output, which are older than `LinearSpec`'s."""
    names = {"output_size": "out_features", "input_size": "in_features"}
    return {names.get(key, key): value for key, value in asdict(layer).items()}
