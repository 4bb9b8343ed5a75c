# SPDX-License-Identifier: Apache-2.0
"""The stored weights of a float model."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import CheckpointReader, TensorInfo

from ..errors import CalibrationError

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class FloatWeights:
    """Tensors in the safetensors files of a model directory, read on request.

    Attributes:
        tensors: headers by name.

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
        self.tensors: dict[str, TensorInfo] = CheckpointReader(directory).tensors

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

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is stored."""
        return _TORCH_DTYPES[self.tensors[name].dtype]

    def missing(self, name: str) -> CalibrationError:
        """The error for a parameter that the files do not hold."""
        return CalibrationError(
            f"{self.directory}: tensor {name} is not in the model's files. Either they are incomplete, or transformers "
            "stores this kind of model under other names (mixture of experts, multimodal), which cannot be quantized."
        )
