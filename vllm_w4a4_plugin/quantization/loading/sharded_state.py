# SPDX-License-Identifier: Apache-2.0
"""vLLM's load format `sharded_state`: the parameters of each rank, weights packed, in files of its own.

They are saved as they are between loading and vLLM's own preparation of kernels, which drops float weights that it has
packed for oneDNN. Loading copies them into place and lets the same preparation follow.
"""

from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.checkpoint.saved_state import SavedState, read_saved_state
from vllm_w4a4_plugin.constants import LOAD_FORMAT, SAVED_STATE_FILE
from vllm_w4a4_plugin.ops.layout import INT4_BLOCK_BYTES, INT4_GROUP_MULTIPLE, INT4_TILE_ROWS
from vllm_w4a4_plugin.quantization.parameters.base import Completeness
from vllm_w4a4_plugin.quantization.steps import fuse_steps

from .biases import add_missing_biases
from .guard import LoadGuard


def settings(config: VllmConfig) -> dict[str, Any]:
    """On what the parameters of a rank depend, besides the checkpoint."""
    parallel = config.parallel_config
    return {
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "enable_expert_parallel": parallel.enable_expert_parallel,
        "expert_placement_strategy": parallel.expert_placement_strategy,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "VLLM_W4A4_LOCAL_SCALES": envs.VLLM_W4A4_LOCAL_SCALES,
        "layout of packed weights": [INT4_TILE_ROWS, INT4_GROUP_MULTIPLE, INT4_BLOCK_BYTES],
    }


class PackedStateLoader(ShardedStateLoader):
    """Loads what `save` has saved."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="sharded_state"))

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        self.vllm_config = vllm_config
        return super().load_model(vllm_config, model_config, prefix)

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        directory = Path(model_config.model)
        state = read_saved_state(directory)
        if state is None:
            raise CheckpointError(f"{directory}: no {SAVED_STATE_FILE}. Save a sharded state there first.")
        state.check_settings(str(directory), settings(self.vllm_config))
        quant_config: Any = self.vllm_config.quant_config
        inventory = quant_config.inventory.without(state.zero_biases)
        add_missing_biases(model, inventory, quant_config.packed_modules_mapping)
        files = sorted(directory.glob(self._render_default_pattern(self.pattern, part="*")))
        _copy_into(model, self.iterate_over_files(map(str, files)), directory)
        for parameter in model.parameters():
            if isinstance(parameter, Completeness):
                parameter.mark_filled()
        fuse_steps(model, self.vllm_config)
        model.load_weights = _refuse_to_load


def save(config: VllmConfig, model: Any, path: str, pattern: str | None, max_size: int | None) -> None:
    """Write this rank's parameters as its checkpoint gives them, and how they came to be.

    The checkpoint is loaded once more for it, beside the model that is being served.

    Args:
        config: vLLM's, of the engine.
        model: that is being served.
        path: an existing directory. pattern, max_size: names and bytes of the files, as vLLM's own `save_model` has it.

    Raises:
        CheckpointError: the model is not the one of its checkpoint, or that is not on this machine.
    """
    guard = getattr(model.load_weights, "__self__", None)
    source = Path(config.model_config.model)
    if config.load_config.load_format != LOAD_FORMAT or not isinstance(guard, LoadGuard) or not source.is_dir():
        raise CheckpointError(
            f"{source}: a sharded state can be saved of a model that was loaded from a directory with "
            f"--load-format auto, found {config.load_config.load_format}. Start vLLM so and save again."
        )
    if guard.was_reloaded:
        raise CheckpointError(
            f"{source}: other weights were loaded since vLLM started, and a sharded state has those of the "
            "checkpoint. Start vLLM with the new checkpoint and save again."
        )
    fresh = _loaded(config)
    ShardedStateLoader.save_model(fresh, path, pattern, max_size)
    if get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank:
        tensors = CheckpointReader(source).tensors
        SavedState(settings(config), tensors, sorted(guard.zero_biases)).write(Path(path))


def _loaded(config: VllmConfig) -> torch.nn.Module:
    """Another model of the same checkpoint, whose layers vLLM has not prepared for its kernels."""
    config = copy(config)
    config.quant_config = type(config)._get_quantization_config(config.model_config, config.load_config)
    config.compilation_config = copy(config.compilation_config)
    # Where layers enter themselves by name, once.
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    loader: Any = get_model_loader(config.load_config)
    loader.vllm_config, loader.quant_config = config, config.quant_config
    with set_current_vllm_config(config):  # workers have none in force when they are asked to save
        with set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
            model = initialize_model(config)
        loader.load_weights(model, config.model_config)
    return model


def _copy_into(model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], directory: Path) -> None:
    missing = ShardedStateLoader._filter_subtensors(model.state_dict())
    for name, tensor in tensors:
        if name not in missing:
            raise CheckpointError(f"{directory}: tensor {name}: vLLM's {type(model).__name__} has none of that name.")
        target = missing.pop(name)
        if (target.shape, target.dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(
                f"{directory}: tensor {name}: expected {target.dtype} {list(target.shape)}, found {tensor.dtype} "
                f"{list(tensor.shape)}. Save the state again, on this machine and with these options."
            )
        target.copy_(tensor)
    if missing:
        raise CheckpointError(
            f"{directory}: tensor {next(iter(missing))} and {len(missing) - 1} more: in none of this rank's files. "
            "Copy or save the state again."
        )


def _refuse_to_load(weights: object) -> set[str]:
    raise CheckpointError(
        "The model was loaded from a sharded state, into which a checkpoint's tensors cannot be loaded. Start vLLM "
        "with the checkpoint itself."
    )
