# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 inspect DIR`: what a checkpoint contains."""

import argparse
import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.layer import TENSORS_OF, linear_spec
from vllm_w4a4_plugin.checkpoint.resolve import module_type
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
    layers = [
        linear_spec(reader.tensors, name, kind)
        for name in linear_modules(reader)
        if (kind := module_type(reader.description, name)) in TENSORS_OF
    ]
    if args.json:
        summary: dict[str, Any] = {
            "directory": str(reader.directory),
            "architectures": reader.config.get("architectures"),
            "total_bytes": sum(info.nbytes for info in reader.tensors.values()),
            "linear_layers": [asdict(layer) for layer in layers],
        }
        print(json.dumps(summary, indent=2))
        return 0
    kinds = Counter(
        (layer.name.rpartition(".")[2], layer.quant_type.value, f"{layer.out_features} x {layer.in_features}",
         _transform(layer.left, layer.right, layer.quant_type), str(layer.groups))
        for layer in layers
    )  # fmt: skip
    rows = [(*kind, str(count)) for kind, count in kinds.items()]
    print(format_table(("linear", "quant type", "out x in", "transform", "groups", "layers"), rows))
    total = sum(info.nbytes for info in reader.tensors.values())
    print(f"\n{len(reader.tensors)} tensors in {len({i.file for i in reader.tensors.values()})} files, {total:,} bytes")
    return 0


def _transform(left: int | None, right: int | None, quant_type: QuantType) -> str:
    if quant_type is not QuantType.W4A4_FLATQUANT_DYNAMIC:
        return ""
    return " x ".join("I" if size is None else str(size) for size in (left, right))
