# SPDX-License-Identifier: Apache-2.0
"""The directory of an unfinished run, next to its output, which survives interruptions."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CalibrationError
from ..files import save_bytes

WORK_SUFFIX = ".quantizing"


class WorkDirectory:
    """Names of the files of a run.

    Args:
        output: directory that the run will make.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(output.name + WORK_SUFFIX)

    def check_output(self, resume: bool) -> None:
        """Refuse an output that exists, and an interrupted run that is not to be resumed.

        Raises:
            CalibrationError: one of the two.
        """
        if self.output.exists():
            left = ""
            if self.path.exists():
                left = f" {self.path} is left over from the run that made it; remove that too."
            raise CalibrationError(
                f"{self.output}: exists already. Remove it or choose another output directory.{left}"
            )
        if self._identity.exists() and not resume:
            raise CalibrationError(
                f"{self.path}: holds an interrupted run. Continue it with `resume`, or remove it to start over."
            )

    def open(self, identity: Mapping[str, Any]) -> None:
        """Make the directory, or check that the run in it is the same.

        Args:
            identity: what decides the result, as JSON values by name.

        Raises:
            CalibrationError: the interrupted run was started with something else, or the directory cannot be made.
        """
        if self._identity.exists():
            found = json.loads(self._identity.read_text())
            if changed := [key for key in identity if identity[key] != found.get(key)]:
                raise CalibrationError(
                    f"{self.path}: the interrupted run was started with different {', '.join(changed)}. Repeat its "
                    f"command with `resume`, or remove {self.path} to start over."
                )
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            save_bytes(json.dumps(identity).encode(), self._identity)
        except OSError as error:
            raise CalibrationError(f"{self.path}: cannot be made: {error}") from None

    def remove(self) -> None:
        """Remove the directory and everything in it."""
        shutil.rmtree(self.path)

    def nbytes(self) -> int:
        """Size of the files written so far."""
        return sum(file.stat().st_size for file in self.path.glob("*"))

    @property
    def outer(self) -> Path:
        """Tensors that belong to no block."""
        return self.path / "outer.safetensors"

    def record(self, index: int) -> Path:
        """The record of block `index`; the block counts as finished when this file exists."""
        return self.path / f"block-{index:05d}.json"

    def tensors(self, index: int) -> Path:
        """The tensors of block `index`, before any distillation."""
        return self.path / f"block-{index:05d}.safetensors"

    def distilled(self, index: int) -> Path:
        """The tensors of block `index` after distillation."""
        return self.path / f"distilled-{index:05d}.safetensors"

    def hidden(self, index: int) -> Path:
        """The input of block `index`, computed by the quantized blocks before it."""
        return self.path / f"hidden-{index:05d}.safetensors"

    @property
    def _identity(self) -> Path:
        return self.path / "run.json"


def fingerprint(directory: Path) -> list[list[Any]]:
    """What tells a model or checkpoint from another without reading it: name, size and time of its weight files."""
    files = sorted(directory.glob("*.safetensors"))
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
