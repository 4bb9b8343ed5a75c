# SPDX-License-Identifier: Apache-2.0
"""Quantization of a whole model, block by block, resumable."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.writer import MODEL_QUANT_TYPE, stored_tensors, write_checkpoint

from . import sensitivity
from .activations import Activations
from .adopt import adopt_block, check_origin
from .block import BlockQuantizer, LayerReport
from .distill import QuantizedBlock, distill
from .errors import CalibrationError
from .files import save_bytes, save_tensors
from .model import HEAD, StreamedModel
from .progress import Listener, Phase, Progress, silent
from .recipe import Recipe
from .structure import Role
from .team import Team

WORK_SUFFIX = ".quantizing"


@dataclass(frozen=True)
class Settings:
    """What decides the result, beside model, text and recipe.

    Attributes:
        seed: of the flat rotations and of sampling.
        weigh_tokens: weigh tokens by the squared gradient of the loss (`sensitivity`).
        weigh_rows: weigh output rows in the same way.
        distill: steps of training towards the float model's predictions, the whole model in memory (`distill`).
    """

    seed: int = 0
    weigh_tokens: bool = False
    weigh_rows: bool = False
    distill: int = 0


@dataclass
class BlockRecord:
    """A finished block: quant type per tensor, linear layers that share an input, and what the report shows.

    Its loss is None where the block was taken from another checkpoint.
    """

    name: str
    types: dict[str, str]
    groups: list[list[str]]
    loss: float | None
    reports: list[dict[str, Any]] = field(default_factory=list)

    def layers(self) -> list[LayerReport]:
        """The reports, typed."""
        return [LayerReport(**report) for report in self.reports]


Extras = Callable[[list[BlockRecord], int], Mapping[str, str]]
"""Further small files (name -> text), from the records and the bytes of all tensors."""


class Quantization:
    """One run, in a work directory beside the output that survives interruptions.

    Args:
        model: to quantize; recipe, settings: how.
        ids: calibration tokens [rows, length].
        output: directory to make.
        resume: continue in an existing work directory.
        on_disk: keep activations in files there. team: devices that share the work, by default the model's alone.
        start_from: a checkpoint made from `model` whose blocks are taken as they are, whatever the recipe says.

    Raises:
        CalibrationError: the output exists, an interrupted run is there and `resume` was not asked for, it was
            started with another model, text, recipe or other settings, `start_from` is of another model, or the text
            has tokens that the model does not know.
    """

    def __init__(
        self,
        model: StreamedModel,
        recipe: Recipe,
        settings: Settings,
        ids: Tensor,
        output: Path,
        resume: bool,
        on_disk: bool = False,
        team: Team | None = None,
        start_from: Path | None = None,
    ) -> None:
        self.start_from = CheckpointReader(start_from) if start_from else None
        if self.start_from:
            check_origin(model, self.start_from)
        vocabulary = len(model.skeleton.get_input_embeddings().weight)
        if ids.max() >= vocabulary:
            raise CalibrationError(
                f"{model.directory}: the tokenizer gives token {ids.max()}, the embedding has {vocabulary} rows. The "
                "tokenizer's files belong to another model."
            )
        self.model, self.recipe, self.settings, self.ids, self.output = model, recipe, settings, ids, output
        self.work = work_directory(output)
        self.team = team or Team([model.device])
        self.activations = Activations(self.work if on_disk else None)
        self._open(resume)

    def run(
        self, listener: Listener = silent, extras: Extras = lambda records, nbytes: {}
    ) -> tuple[list[BlockRecord], int]:
        """Quantize every block that is not finished, then write the checkpoint.

        Args:
            listener: told of every step.
            extras: files that are to lie in the checkpoint's directory too.

        Returns:
            A record per block, and the bytes of all tensors.
        """
        try:
            records = self._blocks(listener)
            if self.settings.distill:
                self._distill(records, listener)
            listener(Progress(Phase.WRITING, 0, 1))
            nbytes = self._write(records, extras)
            listener(Progress(Phase.WRITING, 1, 1))
        except OSError as error:
            raise CalibrationError(
                f"{self.work}: cannot be written: {error}. Free disk space and continue with --resume."
            ) from None
        shutil.rmtree(self.work)
        return records, nbytes

    def _blocks(self, listener: Listener) -> list[BlockRecord]:
        if self.start_from:
            return [self._adopted(index, self.start_from) for index in range(len(self.model))]
        if self.settings.weigh_tokens:
            sensitivity.measure(self.model, self.ids, self.work, listener)
        hidden, _ = self.model.start(self.ids)
        records: list[BlockRecord] = []
        for index in range(len(self.model)):
            if self._file(index, "json").exists():
                records.append(BlockRecord(**json.loads(self._file(index, "json").read_text())))
                continue
            if index:
                hidden = load_file(self.work / f"hidden-{index:05d}.safetensors")["hidden"]
            records.append(self._block(index, hidden, partial(self._at_block, listener, index)))
            (self.work / f"hidden-{index:05d}.safetensors").unlink(missing_ok=True)
            self._at_block(listener, index + 1, "")
        return records

    def _at_block(self, listener: Listener, index: int, detail: str) -> None:
        listener(Progress(Phase.QUANTIZING, index, len(self.model), detail))

    def _block(self, index: int, hidden: Tensor, progress: Callable[[str], None]) -> BlockRecord:
        block, name = self.model.load_block(index), self.model.block_name(index)
        groups = self.model.groups[index]
        types = self.recipe.of_block(name, groups)
        quantizer = BlockQuantizer(
            self.model,
            index,
            block,
            groups,
            types,
            hidden,
            self.settings.seed,
            lambda role: self._weights(index, role),
            self.activations,
            self.team,
        )
        result = quantizer.run(progress)
        save_tensors(result.tensors, self._file(index, "safetensors"))
        save_tensors({"hidden": result.hidden}, self.work / f"hidden-{index + 1:05d}.safetensors")
        record = BlockRecord(
            name,
            {n: t.value for n, t in result.types.items()},
            [list(group.linears) for group in groups.values()],
            result.loss,
            [asdict(r) for r in result.reports],
        )
        # Written last: a block counts as finished when this file exists.
        save_bytes(json.dumps(asdict(record)).encode(), self._file(index, "json"))
        return record

    def _adopted(self, index: int, reader: CheckpointReader) -> BlockRecord:
        """The record of a block of another checkpoint; its tensors are in a file afterwards."""
        tensors, types, reports = adopt_block(self.model, reader, index)
        save_tensors(tensors, self._file(index, "safetensors"))
        linears = [list(group.linears) for group in self.model.groups[index].values()]
        return BlockRecord(self.model.block_name(index), types, linears, None, [asdict(r) for r in reports])

    def _weights(self, index: int, role: Role) -> tuple[Tensor, Tensor] | None:
        if not self.settings.weigh_tokens:
            return None
        tokens, rows = sensitivity.load(self.work, index, role)
        return tokens, rows if self.settings.weigh_rows else torch.ones_like(rows)

    def _write(self, records: list[BlockRecord], extras: Extras) -> int:
        """Write the output directory; returns the bytes of all tensors."""
        outer = self.model.outer_tensors()
        outer_file = self.work / "outer.safetensors"
        save_tensors(outer, outer_file)
        before = [f"{self.model.embedding_name}.weight"]
        types: dict[str, QuantType] = dict.fromkeys(before, QuantType.FLOAT)
        for record in records:
            types |= {n: QuantType(t) for n, t in record.types.items()}
        types |= dict.fromkeys((n for n in outer if n not in before and n != HEAD), QuantType.FLOAT)
        if HEAD in outer:
            types[HEAD] = QuantType.FLOAT
        stem = "distilled" if self.settings.distill else "block"
        parts = [outer_file, *(self._file(i, "safetensors", stem) for i in range(len(records)))]
        nbytes = sum(tensor.nbytes for part in parts for tensor in stored_tensors(part))
        headline, changes = MODEL_QUANT_TYPE, {}
        if self.recipe.rotates_residual:
            headline, changes = QuantType.W4A4_DYNAMIC, {"tie_word_embeddings": False}
        more = extras(records, nbytes)
        write_checkpoint(self.model.directory, self.output, parts, types, headline, changes, extras=more)
        return nbytes

    def _distill(self, records: list[BlockRecord], listener: Listener) -> None:
        blocks = [
            QuantizedBlock(
                load_file(self._file(index, "safetensors")),
                {name: QuantType(kind) for name, kind in record.types.items()},
                record.groups,
            )
            for index, record in enumerate(records)
        ]
        trained = distill(self.model, self.ids, blocks, self.settings.distill, self.settings.seed, self.work, listener)
        for index, (record, tensors) in enumerate(zip(records, trained, strict=True)):
            save_tensors(tensors, self._file(index, "safetensors", "distilled"))
            for report in record.reports:
                if report["clip"] is not None:
                    report["clip"] = tensors[f"{report['name']}.clip_ratio"].item()

    def _file(self, index: int, suffix: str, stem: str = "block") -> Path:
        return self.work / f"{stem}-{index:05d}.{suffix}"

    def _open(self, resume: bool) -> None:
        check_output(self.output, resume)
        identity = self.work / "run.json"
        wanted = self._identity()
        if identity.exists():
            found = json.loads(identity.read_text())
            if changed := [key for key in wanted if wanted[key] != found.get(key)]:
                raise CalibrationError(
                    f"{self.work}: the interrupted run had another {', '.join(changed)}. Run it as it was started, or "
                    f"remove {self.work} to begin anew."
                )
            return
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            save_bytes(json.dumps(wanted).encode(), identity)
        except OSError as error:
            raise CalibrationError(f"{self.work}: cannot be made: {error}") from None

    def _identity(self) -> Mapping[str, Any]:
        return {
            "model": stamps(self.model.directory),
            "start": stamps(self.start_from.directory) if self.start_from else [],
            "calibration text": hashlib.sha256(self.ids.numpy().tobytes()).hexdigest(),
            "recipe": [sorted(map(list, self.recipe.types.items())), list(map(list, self.recipe.exceptions))],
            "settings": asdict(self.settings),
        }


def stamps(directory: Path) -> list[list[Any]]:
    """What tells a model or checkpoint from another, without reading it: name, size and time of its files."""
    files = sorted(directory.glob("*.safetensors"))
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def work_directory(output: Path) -> Path:
    """Where the unfinished run for `output` lies."""
    return output.with_name(output.name + WORK_SUFFIX)


def check_output(output: Path, resume: bool) -> None:
    """Refuse an output that exists, and an interrupted run that is not to be continued.

    Raises:
        CalibrationError: one of the two.
    """
    work = work_directory(output)
    if output.exists():
        left = f" {work} is what was left of the run that made it; remove that too." if work.exists() else ""
        raise CalibrationError(f"{output}: exists already. Remove it or choose another output directory.{left}")
    if (work / "run.json").exists() and not resume:
        raise CalibrationError(
            f"{work}: holds an interrupted run. Add --resume to continue it, or remove it to begin anew."
        )
