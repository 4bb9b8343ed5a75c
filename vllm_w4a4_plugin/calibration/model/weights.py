# SPDX-License-Identifier: Apache-2.0
"""The stored weights of a float model."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import CheckpointReader, TensorInfo

from ..errors import CalibrationError

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class FloatWeights:
    """Tensors in the safetensors files of a model directory, read on request.

    Attributes:
        tensors: headers by name.
        config: the decoded config.json.

    Raises:
        CalibrationError: the directory holds no model, or no safetensors files.
    """

    def __init__(self, directory: Path) -> None:
        if not (directory / "config.json").is_file():
            raise CalibrationError(f"{directory}: no config.json there; give the directory of a Hugging Face model.")
        if not list(directory.glob("*.safetensors")):
            raise CalibrationError(
                f"{directory}: no *.safetensors file there. Weights in another format must be converted first, e.g. "
                "with transformers' save_pretrained()."
            )
        self.directory = directory
        reader = CheckpointReader(directory)
        self.tensors: dict[str, TensorInfo] = reader.tensors
        self.config = reader.config

    def stored_name(self, name: str) -> str:
        """A parameter's name in the files, of several that published models of a kind have; `name` if none is there."""
        spelled = name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
        return name if name in self.tensors else spelled if spelled in self.tensors else name

    def read(self, name: str) -> Tensor:
        """One tensor as stored.

        Raises:
            CalibrationError: it is not in the files, or cannot be read.
        """
        if name not in self.tensors:
            raise self.missing(name)
        file = self.directory / self.tensors[name].file
        try:
            with safe_open(file, framework="pt") as shard:
                return shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CalibrationError(f"{file}: tensor {name} cannot be read: {error}") from None

    def check_finite(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read every tensor once.

        Args:
            progress: called with the number of tensors that are checked, and of all.

        Raises:
            CalibrationError: one has a NaN or an infinity, or cannot be read.
        """
        for done, name in enumerate(self.tensors):
            progress(done, len(self.tensors))
            tensor = self.read(name)
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            low, high = tensor.aminmax()  # NaN if any entry is
            if not (low.isfinite() and high.isfinite()):
                count = int((~tensor.isfinite()).sum())
                raise CalibrationError(
                    f"{self.directory / self.tensors[name].file}: tensor {name} has {count} of {tensor.numel()} values "
                    "that are NaN or infinite. The float model is damaged: download it again, or repair this tensor."
                )
        progress(len(self.tensors), len(self.tensors))

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is stored.

        Raises:
            CalibrationError: it is no float dtype of more than 8 bits.
        """
        dtype = self.tensors[name].dtype
        if dtype not in _TORCH_DTYPES:
            raise CalibrationError(
                f"{self.directory / self.tensors[name].file}: tensor {name} has dtype {dtype}; expected one of "
                f"{', '.join(_TORCH_DTYPES)}. Give the float model, not a quantized one."
            )
        return _TORCH_DTYPES[dtype]

    def missing(self, name: str) -> CalibrationError:
        """The error for a parameter that the files do not hold."""
        return CalibrationError(
            f"{self.directory}: tensor {name} is not in the model's files. Files are missing, or their tensors "
            "have other names than transformers gives them when it saves this kind of model."
        )
