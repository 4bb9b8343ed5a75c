# SPDX-License-Identifier: Apache-2.0
"""Load formats that read the same files in another way load the same model."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm.model_executor.model_loader import weight_utils

from tests.conftest import MICRO
from tests.loading import loaded_model


def parameters(**arguments: Any) -> dict[str, torch.Tensor]:
    with loaded_model(MICRO, **arguments) as model:
        return {name: parameter.data.clone() for name, parameter in model.named_parameters()}


class Streamer:
    """Run:ai's streamer as vLLM uses it, for environments without it. It lends each tensor until the next one."""

    def __enter__(self) -> "Streamer":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def stream_files(self, files: list[str], **arguments: Any) -> None:
        self.files_to_tensors_metadata = {file: load_file(file) for file in files}

    def get_tensors(self) -> Any:
        for tensors in self.files_to_tensors_metadata.values():
            for name, tensor in tensors.items():
                lent = tensor.clone()
                yield name, lent
                lent.zero_()


@pytest.mark.feature("`--load-format runai_streamer`, files on disk")
def test_runai_streamer(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import runai_model_streamer  # noqa: F401
    except ImportError:
        monkeypatch.setattr(weight_utils, "SafetensorsStreamer", Streamer)
    streamed = parameters(load_format="runai_streamer", model_loader_extra_config={"concurrency": 2})
    expected = parameters()
    assert streamed.keys() == expected.keys()
    assert all(torch.equal(streamed[name], expected[name]) for name in expected)
