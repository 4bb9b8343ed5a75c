# SPDX-License-Identifier: Apache-2.0
"""Quantization of a whole model, block by block, resumable."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.writer import stored_tensors, write_checkpoint

from .. import fisher
from ..activations import Activations
from ..block.plan import BlockPlan
from ..block.quantizer import quantize_block
from ..devices import DevicePool
from ..distill.schedule import Schedule
from ..distill.student import QuantizedBlock
from ..distill.training import distill
from ..errors import CalibrationError
from ..files import save_bytes, save_tensors
from ..model.block import LoadedBlock
from ..progress import Listener, Phase, Progress, silent
from .job import Job
from .outer import outer_types, with_head
from .packing import pack_parts
from .records import BlockRecord, Distillation, Outcome
from .start_from import StartingPoint
from .work import WorkDirectory

ExtraFiles = Callable[[Outcome], Mapping[str, str]]
"""Further small files of the checkpoint, name -> text."""


class Quantization:
    """One run, in a work directory next to the output that survives interruptions.

    Args:
        job: what to quantize, and how.
        output: directory to make.
        resume: continue an interrupted run.
        devices: share the work; by default the model's device alone.
        activations_on_disk: keep activations in files of the work directory.

    Raises:
        CalibrationError: the output exists, there is an interrupted run and `resume` is not set, or that run was
            started with another model, text, recipe or other settings.
    """

    def __init__(
        self,
        job: Job,
        output: Path,
        resume: bool = False,
        devices: DevicePool | None = None,
        activations_on_disk: bool = False,
    ) -> None:
        self.job, self.model, self.output = job, job.model, output
        self.work = WorkDirectory(output)
        self.devices = devices or DevicePool([job.model.device])
        self.activations = Activations(self.work.path if activations_on_disk else None)
        self.work.check_output(resume)
        self.work.open(job.identity())

    def run(self, listener: Listener = silent, extra_files: ExtraFiles = lambda outcome: {}) -> Outcome:
        """Quantize every block that is not finished, then write the checkpoint.

        Args:
            listener: told of every step.
            extra_files: files to be written into the checkpoint's directory as well.
        """
        try:
            records = self._blocks(listener)
            distillation = self._distill(records, listener) if self.job.settings.distill else None
            listener(Progress(Phase.WRITING, 0, 1))
            outcome = self._write(records, distillation, extra_files)
            listener(Progress(Phase.WRITING, 1, 1))
        except OSError as error:
            raise CalibrationError(
                f"{self.work.path}: cannot be written: {error}. Free disk space and continue with `resume`."
            ) from None
        self.work.remove()
        return outcome

    def _blocks(self, listener: Listener) -> list[BlockRecord]:
        if self.job.start_from:
            return [self._copied(index, self.job.start_from) for index in range(len(self.model))]
        if self.job.settings.gradients:
            fisher.measure(self.model, self.job.text.rows, self.work.path, listener)
        hidden, _ = self.model.start(self.job.text.ids)
        records: list[BlockRecord] = []
        for index in range(len(self.model)):
            if self.work.record(index).exists():
                records.append(BlockRecord(**json.loads(self.work.record(index).read_text())))
                continue
            if index:
                hidden = load_file(self.work.hidden(index))["hidden"]
            records.append(self._quantized(index, hidden, partial(self._at_block, listener, index)))
            self.work.hidden(index).unlink(missing_ok=True)
            self._at_block(listener, index + 1, "")
        return records

    def _at_block(self, listener: Listener, index: int, detail: str) -> None:
        listener(Progress(Phase.QUANTIZING, index, len(self.model), detail))

    def _quantized(self, index: int, hidden: Tensor, progress: Callable[[str], None]) -> BlockRecord:
        """Quantize a block; its tensors, output and record are in files afterwards."""
        name, held_out = self.model.block_name(index), len(self.job.text.held_out)
        types = self.job.recipe.of_block(name, self.model.groups[index])
        experts = {
            found.name: self.job.recipe.of_experts(self.model.expert_names(index, found))
            for found in self.model.experts[index]
        }
        weights = partial(self._token_weights, index)
        plan = BlockPlan(types, self.job.settings.seed, weights, held_out, experts=experts)
        load = partial(LoadedBlock, self.model, index)
        result = quantize_block(load, hidden, plan, self.devices, self.activations, progress)
        save_tensors(result.tensors, self.work.tensors(index))
        save_tensors({"hidden": result.hidden}, self.work.hidden(index + 1))
        record = BlockRecord(
            name,
            {tensor: kind.value for tensor, kind in result.types.items()},
            self._linears_by_group(index),
            result.loss,
            [asdict(report) for report in result.reports],
        )
        save_bytes(json.dumps(asdict(record)).encode(), self.work.record(index))  # last, see WorkDirectory.record
        return record

    def _copied(self, index: int, start: StartingPoint) -> BlockRecord:
        """The record of a block of another checkpoint; its tensors are in a file afterwards."""
        block = start.block(index)
        save_tensors(block.tensors, self.work.tensors(index))
        reports = [asdict(report) for report in block.reports]
        return BlockRecord(self.model.block_name(index), block.types, self._linears_by_group(index), None, reports)

    def _linears_by_group(self, index: int) -> list[list[str]]:
        groups = [list(group.linears) for group in self.model.groups[index].values()]
        return groups + [list(experts.gate_and_up) for experts in self.model.experts[index]]

    def _token_weights(self, index: int, key: str) -> Tensor | None:
        return fisher.token_weights(self.work.path, index, key) if self.job.settings.gradients else None

    def _distill(self, records: list[BlockRecord], listener: Listener) -> Distillation:
        """Train; the tensors of all blocks are in files afterwards, and the clips in the reports are the new ones."""
        blocks = [
            QuantizedBlock(
                load_file(self.work.tensors(index)),
                {name: QuantType(kind) for name, kind in record.types.items()},
                record.groups,
            )
            for index, record in enumerate(records)
        ]
        schedule = Schedule(self.job.settings.distill, self.job.settings.seed)
        trained = distill(self.model, self.job.text, blocks, schedule, self.work.path, listener)
        for index, (record, tensors) in enumerate(zip(records, trained.blocks, strict=True)):
            save_tensors(tensors, self.work.distilled(index))
            for report in record.reports:
                if report["clip"] is not None:
                    report["clip"] = tensors[f"{report['name']}.clip_ratio"].item()
        return Distillation(schedule.steps, trained.start, trained.end, trained.helped)

    def _write(self, records: list[BlockRecord], distillation: Distillation | None, extra_files: ExtraFiles) -> Outcome:
        """Write the output directory."""
        outer, head = self.model.outer_tensors(), QuantType(self.job.settings.head)
        types = self._types(records, outer_types(outer, head))
        save_tensors(with_head(outer, head), self.work.outer)
        file_of = self.work.distilled if self.job.settings.distill else self.work.tensors
        parts = [self.work.outer, *map(file_of, range(len(records)))]
        parts, types = pack_parts(parts, types)
        nbytes = sum(tensor.nbytes for part in parts for tensor in stored_tensors(part))
        changes = {"tie_word_embeddings": False} if self.job.recipe.rotates_residual else {}
        outcome = Outcome(records, nbytes, distillation)
        extras = extra_files(outcome)
        headline = self.job.recipe.headline
        write_checkpoint(self.model.directory, self.output, parts, types, headline, changes, extras=extras)
        return outcome

    def _types(self, records: list[BlockRecord], outer: dict[str, QuantType]) -> dict[str, QuantType]:
        """Quant type of every tensor, in msModelSlim's order: embedding, blocks, final norm, head."""
        embedding = f"{self.model.embedding_name}.weight"
        types: dict[str, QuantType] = {embedding: QuantType.FLOAT}
        for record in records:
            types |= {name: QuantType(kind) for name, kind in record.types.items()}
        return types | outer
