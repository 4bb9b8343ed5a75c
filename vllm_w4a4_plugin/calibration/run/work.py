# SPDX-License-Identifier: Apache-2.0
"""The directory of an unfinished run, next to its output, which survives interruptions."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_w4a4_plugin.constants import VERSION

from ..errors import CalibrationError
from ..files import save_bytes

WORK_SUFFIX = ".quantizing"
VERSION_KEY = "version"
"""Under which the identity of a run has `code_version`."""


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
            starter = found.get(VERSION_KEY, "an earlier version")
            if starter != identity[VERSION_KEY]:
                raise CalibrationError(
                    f"{self.path}: the interrupted run was started by {starter}, this is {identity[VERSION_KEY]}; it "
                    "may quantize the remaining blocks in another way. Continue with the version that started it, or "
                    f"remove {self.path} to start over."
                )
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


@cache
def code_version() -> str:
    """What tells this code from any that may give another result: versions of this package and of torch, and a digest.

    The digest is of the sources of calibration: a number in one of them would be forgotten one day. It refuses more
    than it must, such as a run that was started before a comment was changed, but only between two releases.
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    torch_version = metadata.version("torch")
    return f"vllm-w4a4-plugin {VERSION} (calibration code {digest.hexdigest()[:12]}, torch {torch_version})"


def fingerprint(directory: Path) -> list[list[Any]]:
    """What tells a model or checkpoint from another without reading it: name, size and time of its weight files."""
    files = sorted(directory.glob("*.safetensors"))
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
