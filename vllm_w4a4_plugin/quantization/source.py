# SPDX-License-Identifier: Apache-2.0
"""Finding a checkpoint, on disk or on a hub, before vLLM loads its weights."""

from pathlib import Path

from vllm.config import get_current_vllm_config_or_none
from vllm.transformers_utils.config import get_safetensors_params_metadata
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict, try_get_local_file

from vllm_w4a4_plugin.checkpoint import (
    DESCRIPTION_FILE,
    CheckpointError,
    CheckpointReader,
    QuantDescription,
    TensorInfo,
)
from vllm_w4a4_plugin.checkpoint.verify import check_headers


def has_description(model: str, revision: str | None = None) -> bool:
    """Whether `model`, a directory or a hub repository, holds a description file. Never raises."""
    if Path(model).is_dir():
        return (Path(model) / DESCRIPTION_FILE).exists()
    try:
        return get_hf_file_to_dict(DESCRIPTION_FILE, model, revision) is not None
    except Exception:
        # Whatever keeps the hub from answering will be reported by vLLM's own loading of the model.
        return False


def tensor_headers(model: str, revision: str | None = None) -> dict[str, TensorInfo]:
    """The weight headers of `model` by tensor name, not checked further; empty where they cannot be had.

    Raises:
        CheckpointError: a local index or shard is damaged.
    """
    if Path(model).is_dir():
        reader = CheckpointReader(model)
        return reader.tensors if _has_weights(reader) else {}
    try:
        metadata = get_safetensors_params_metadata(model, revision=revision)
    except Exception:
        # Whatever keeps the hub from answering will be reported by vLLM's own loading of the weights.
        return {}
    return {name: TensorInfo(name, model, info["dtype"], tuple(info["shape"])) for name, info in metadata.items()}


def loads_dummy_weights() -> bool:
    """Whether vLLM will fill parameters with made-up values instead of a checkpoint's."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def open_checkpoint(model: str, revision: str | None = None) -> tuple[QuantDescription, dict[str, TensorInfo]]:
    """Description and weight headers of `model`, checked as far as headers allow.

    Returns:
        The description, and the tensors by name; the latter is empty where there are no weights yet.

    Raises:
        CheckpointError: the description or the headers are bad.
    """
    if Path(model).is_dir():
        reader = CheckpointReader(model)
        if not _has_weights(reader):
            return reader.description, {}
        check_headers(reader)
        return reader.description, reader.tensors
    data = get_hf_file_to_dict(DESCRIPTION_FILE, model, revision)
    if data is None:
        raise CheckpointError(
            f"{model}: neither a directory nor a hub repository with a {DESCRIPTION_FILE}. "
            "Check the name, or quantize the model first."
        )
    cached = try_get_local_file(model, DESCRIPTION_FILE, revision)
    description = QuantDescription.parse(data, str(cached or f"{model}/{DESCRIPTION_FILE}"))
    metadata = get_safetensors_params_metadata(model, revision=revision)
    return description, {
        name: TensorInfo(name, model, info["dtype"], tuple(info["shape"])) for name, info in metadata.items()
    }


def _has_weights(reader: CheckpointReader) -> bool:
    return reader.index_file is not None or any(reader.directory.glob("*.safetensors"))
