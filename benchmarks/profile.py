# SPDX-License-Identifier: Apache-2.0
"""What a prefill and a decode step are made of: the profile's shares as a table, times taken from runs without it."""

import statistics
from typing import Any

import torch

from .measure import interleaved
from .peers import w4a4_flatquant
from .shapes import Model
from .trace import PARTS, parts
from .workload import MOST_REQUESTS, PREFILL

RUNS = {"prefill": PREFILL, "decode 1": 1, f"decode {MOST_REQUESTS}": MOST_REQUESTS}
"""What is profiled, and how many tokens a linear layer then gets."""

LINEAR, QUANTIZATION, PRODUCTS = "linear layers", "linear layers: transform and quantization", "linear layers: products"


def quantize_shares(model: Model) -> dict[str, float]:
    """For each of RUNS the share of the W4A4 layers' time that their transforms and quantization take, without steps
    before them, in bfloat16."""
    quantize, whole = dict.fromkeys(RUNS, 0.0), dict.fromkeys(RUNS, 0.0)
    for linear in model.linears:
        prepared = w4a4_flatquant(linear)
        assert prepared.transform is not None
        for run, tokens in RUNS.items():
            x = torch.randn(tokens, linear.input_size, dtype=torch.bfloat16)
            times = interleaved(
                {
                    "quantize": lambda x=x, t=prepared.transform: torch.ops.vllm_w4a4.kronecker_quant(x, *t),
                    "whole": lambda x=x, prepared=prepared: prepared.run(x),
                },
                seconds=0.2,
            )
            quantize[run] += statistics.median(times["quantize"])
            whole[run] += statistics.median(times["whole"])
    return {run: quantize[run] / whole[run] for run in RUNS}


def table(rounds: list[dict[str, Any]]) -> list[str]:
    """Rows of parts and columns of RUNS for one contestant, of whose rounds the first was profiled."""
    columns = {}
    for run in RUNS:
        shares = parts(rounds[0][f"profile {run}"])
        linear, quantized = shares.pop(LINEAR), rounds[0]["quantize share"][run]
        split = {PRODUCTS: linear * (1 - quantized), QUANTIZATION: linear * quantized}
        milliseconds = statistics.median(record[run] for record in rounds) * 1e3
        columns[run] = {part: (share, share * milliseconds) for part, share in (split | shares).items()}
    lines = ["| part | " + " | ".join(RUNS) + " |", "| --- |" + " --- |" * len(RUNS)]
    for part in (PRODUCTS, QUANTIZATION, *(part for part in PARTS if part != LINEAR)):
        cells = (f"{columns[run][part][0]:.1%}, {columns[run][part][1]:.2f} ms" for run in RUNS)
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return lines
