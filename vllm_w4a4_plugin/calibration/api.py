# SPDX-License-Identifier: Apache-2.0
"""Quantization as one call: what `vllm-w4a4 quantize` does, for Python."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .block.report import LayerReport
from .data.held_out import text_warnings
from .options import QuantizeOptions
from .progress import Listener, silent
from .run.pipeline import Quantization
from .run.preparation import Preparation
from .run.records import BlockRecord, Distillation, Outcome
from .run.report import REPORT_FILE, render

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """A finished quantization.

    Attributes:
        output: directory of the checkpoint, in which `quantization_report.html` shows this report.
        blocks: what was done to each decoder block.
        distillation: what it did, and whether its result was kept; None if there was none.
        warnings: about the calibration text, and about layers that it did not help.
        nbytes: size of all tensors of the checkpoint.
        float_nbytes: size of all tensors of the float model.
        seconds: how long it took.
    """

    output: Path
    blocks: Sequence[BlockRecord]
    distillation: Distillation | None
    warnings: Sequence[str]
    nbytes: int
    float_nbytes: int
    seconds: float

    @property
    def layers(self) -> list[LayerReport]:
        """What was done to each linear layer, in order of execution."""
        return [layer for block in self.blocks for layer in block.layers()]

    @property
    def fallbacks(self) -> list[LayerReport]:
        """The layers for which calibration, or a part of it, was undone, since it made them worse on held-out text."""
        return [layer for layer in self.layers if layer.fallback]


def quantize(model: Path, output: Path, options: QuantizeOptions | None = None, progress: Listener = silent) -> Report:
    """Quantize a float Hugging Face model.

    The estimated memory, disk space and time are logged (level INFO) before the work starts, and so is what the user
    may want to change (level WARNING), such as layers for which NPUs have no fused kernel.

    Args:
        model: directory of the float model.
        output: directory to make.
        options: all other choices.
        progress: told of every step.

    Raises:
        CheckpointError: anything that the user can correct; nearly always a `CalibrationError`. The message says what
            to do and names options in backquotes. An interrupted run can be continued with `resume`.
    """
    started = time.monotonic()
    prepared = Preparation(Path(model), Path(output), options or QuantizeOptions())
    job = prepared.job(prepared.calibration_ids(progress))
    quantization = Quantization(
        job, prepared.output, prepared.options.resume, prepared.devices, prepared.options.activations_on_disk
    )

    warnings = text_warnings(job.text, prepared.text_name)
    for warning in warnings:
        logger.warning("%s", warning)

    def page(outcome: Outcome) -> Mapping[str, str]:
        facts = prepared.facts(job.text, outcome, [*warnings, *outcome.warnings], time.monotonic() - started)
        return {REPORT_FILE: render(f"{prepared.name}: quantization report", facts, outcome.records)}

    outcome = quantization.run(progress, page)
    for warning in outcome.warnings:
        logger.warning("%s", warning)
    return Report(
        prepared.output,
        outcome.records,
        outcome.distillation,
        [*warnings, *outcome.warnings],
        outcome.nbytes,
        prepared.float_nbytes,
        time.monotonic() - started,
    )
