# SPDX-License-Identifier: Apache-2.0
"""What the user sees while a checkpoint loads: how far packing is, then a table of layers and operators."""

import time
from collections import Counter
from typing import TYPE_CHECKING

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.constants import LOGGER
from vllm_w4a4_plugin.text import format_table

if TYPE_CHECKING:
    import torch

    from .schemes import LinearScheme
    from .schemes.experts_base import BaseExpertsScheme

logger = init_logger(LOGGER)

PROGRESS_INTERVAL_S = 10.0
"""Time between two lines about packing. They are lines because vLLM has a progress bar of its own meanwhile."""

HEADER = ("quant type", "layers", "weights", "operator", "remark")


def exchange_remark(sent_bytes: int) -> str:
    """What a rank sends to each other one in a layer that they share, besides their outputs."""
    return f"sends each rank {sent_bytes} bytes per token and layer"


class LoadReport:
    """The layers of one model on one rank."""

    def __init__(self) -> None:
        self._expected: set[str] = set()
        self._tensors = self._packed = 0
        self._last_line: float | None = None
        self._rows: Counter[tuple[str, str, str]] = Counter()
        self._bytes: Counter[tuple[str, str, str]] = Counter()

    def expect(self, scheme: "LinearScheme | BaseExpertsScheme") -> None:
        """A quantized layer was created and will be loaded. Says nothing new if it was created before."""
        if scheme.plan.prefix in self._expected:
            return
        self._expected.add(scheme.plan.prefix)
        if scheme.packs_weights:
            self._tensors += len(scheme.plan.shards)

    def float_layer(self, weight_bytes: int, sent_bytes: int = 0) -> None:
        """A layer was created with vLLM's own unquantized method; ranks may send each other parts of tokens for it."""
        remark = exchange_remark(sent_bytes) if sent_bytes else ""
        self.others(QuantType.FLOAT.value, "vLLM unquantized linear", weight_bytes, remark)

    def others(self, quant_type: str, operator: str, weight_bytes: int, remark: str = "") -> None:
        """A layer was created that vLLM or vllm-ascend runs; `weight_bytes` is its stored size in the checkpoint."""
        self._add((quant_type, operator, remark), weight_bytes)

    def packed(self) -> None:
        """A weight tensor was packed."""
        now = time.monotonic()
        if self._last_line is None:
            self._last_line = now
        self._packed += 1
        if self._packed >= self._tensors:
            self._packed, self._last_line = 0, None
        elif now - self._last_line >= PROGRESS_INTERVAL_S and get_tensor_model_parallel_rank() == 0:
            self._last_line = now
            logger.info("Packed %d of %d weight tensors", self._packed, self._tensors)

    def ready(self, scheme: "LinearScheme | BaseExpertsScheme", layer: "torch.nn.Module") -> None:
        """A quantized layer is loaded; after the last one the table is logged, once."""
        if scheme.plan.prefix not in self._expected:
            return
        self._expected.discard(scheme.plan.prefix)
        sent = exchange_remark(scheme.sent_bytes) if scheme.sent_bytes else ""
        remark = "; ".join(filter(None, (sent, scheme.remark)))
        key = (scheme.spec.quant_type.value, scheme.operator, remark)
        self._add(key, scheme.weight_bytes(layer))
        if not self._expected and get_tensor_model_parallel_rank() == 0:
            logger.info("W4A4 plugin: layers of this model\n%s", self.table())

    def table(self) -> str:
        """The start-up table."""
        rows = [
            (kind, str(count), f"{self._bytes[kind, operator, remark] / 2**20:.1f} MiB", operator, remark)
            for (kind, operator, remark), count in sorted(self._rows.items())
        ]
        return format_table(HEADER, rows)

    def _add(self, key: tuple[str, str, str], weight_bytes: int) -> None:
        self._rows[key] += 1
        self._bytes[key] += weight_bytes
