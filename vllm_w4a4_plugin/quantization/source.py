# SPDX-License-Identifier: Apache-2.0
"""Finding a checkpoint, on disk or on a hub, before vLLM loads its weights."""

from pathlib import Path

from vllm.config import get_current_vllm_config_or_none
from vllm.transformers_utils.config import get_safetensors_params_metadata
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict, try_get_local_file

from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader, QuantDescription, TensorInfo
from vllm_w4a4_plugin.checkpoint.description import check_name
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.saved_state import read_saved_state, saved_inventory
from vllm_w4a4_plugin.checkpoint.verify import check_headers
from vllm_w4a4_plugin.constants import DESCRIPTION_FILE


def has_description(model: str, revision: str | None = None) -> bool:
    """Whether `model`, a directory or a hub repository, holds a description file. Never raises."""
    if Path(model).is_dir():
        return (Path(model) / DESCRIPTION_FILE).exists()
    try:
        return get_hf_file_to_dict(DESCRIPTION_FILE, model, revision) is not None
    except Exception:
        # If the hub cannot be reached, vLLM reports it when it loads the model.
        return False


def tensor_headers(model: str, revision: str | None = None) -> dict[str, TensorInfo]:
    """The weight headers of `model` by tensor name, not checked further; empty if they are not available.

    Raises:
        CheckpointError: a local index or shard is damaged.
    """
    if Path(model).is_dir():
        reader = CheckpointReader(model)
        return reader.tensors if reader.has_weights else {}
    try:
        return _hub_headers(model, revision)
    except Exception:
        # If the hub cannot be reached, vLLM reports it when it loads the weights.
        return {}


def loads_dummy_weights() -> bool:
    """Whether vLLM will fill parameters with dummy values (`--load-format dummy`)."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def open_checkpoint(model: str, revision: str | None = None) -> Inventory:
    """The description and the weight headers of `model`, with every check that needs no tensor values.

    Raises:
        CheckpointError: the description or the headers are bad.
    """
    if Path(model).is_dir():
        if (state := read_saved_state(Path(model))) is not None:
            return saved_inventory(Path(model), state)
        reader = CheckpointReader(model)
        if not reader.has_weights:
            return Inventory(reader.description)
        return check_headers(reader)
    data = get_hf_file_to_dict(DESCRIPTION_FILE, model, revision)
    if data is None:
        raise CheckpointError(
            f"{model}: neither a directory nor a hub repository with a {DESCRIPTION_FILE}. "
            "Check the name, or quantize the model first."
        )
    cached = try_get_local_file(model, DESCRIPTION_FILE, revision)
    description = QuantDescription.parse(data, str(cached or f"{model}/{DESCRIPTION_FILE}"))
    return Inventory(description, _hub_headers(model, revision))


def _hub_headers(model: str, revision: str | None) -> dict[str, TensorInfo]:
    metadata = get_safetensors_params_metadata(model, revision=revision)
    for name in metadata:
        check_name(name, model)
    return {name: TensorInfo(name, model, info["dtype"], tuple(info["shape"])) for name, info in metadata.items()}
