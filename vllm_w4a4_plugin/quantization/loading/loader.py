# SPDX-License-Identifier: Apache-2.0
"""vLLM's model loader for checkpoints with a description: it reads the checked files and accounts for their tensors."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.runai_streamer_loader import RunaiModelStreamerLoader
from vllm.model_executor.model_loader.weight_utils import runai_safetensors_weights_iterator
from vllm.model_executor.models.utils import get_draft_quant_config

from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.types import BIAS
from vllm_w4a4_plugin.checkpoint.verify import check_headers, tied_head_findings
from vllm_w4a4_plugin.constants import (
    DESCRIPTION_FILE,
    LOAD_FORMAT,
    LOGGER,
    SAVED_LOAD_FORMAT,
    STREAMED_LOAD_FORMAT,
)
from vllm_w4a4_plugin.quantization.steps import fuse_steps

from .biases import add_missing_biases
from .guard import LoadGuard, WholeCheckpoint
from .rotation import warn_of_rotation
from .sharded_state import PackedStateLoader

logger = init_logger(LOGGER)

STREAMER_OPTIONS = ("distributed", "concurrency", "memory_limit")


def register_loader() -> None:
    """Make the load formats known in this process. Idempotent."""
    _LOAD_FORMAT_TO_MODEL_LOADER[LOAD_FORMAT] = W4A4ModelLoader
    _LOAD_FORMAT_TO_MODEL_LOADER[STREAMED_LOAD_FORMAT] = StreamingLoader
    _LOAD_FORMAT_TO_MODEL_LOADER[SAVED_LOAD_FORMAT] = PackedStateLoader


class W4A4ModelLoader(DefaultModelLoader):
    """vLLM's loader of safetensors, with another answer to two questions: which files, and what of each tensor."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="safetensors"))

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        # A draft model has a configuration of its own, which is not the one in force. A head that drafts (Eagle) is
        # loaded with the target's configuration around it, but is quantized by its own.
        is_target = model_config is vllm_config.model_config
        self.vllm_config = vllm_config
        self.quant_config: Any = vllm_config.quant_config if is_target else get_draft_quant_config(vllm_config)
        if not is_target and vllm_config.speculative_config.use_eagle():
            target = vllm_config.model_config
            folder = self._prepare_weights(target.model, None, target.revision, True, None)[0]
            warn_of_rotation(CheckpointReader(Path(folder)))
        return super().load_model(vllm_config, model_config, prefix)

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        if self.quant_config is None:
            super().load_weights(model, model_config)
            return
        quant_config = self.quant_config
        folder = Path(self._prepare_weights(model_config.model, None, model_config.revision, True, None)[0])
        reader = CheckpointReader(folder)
        # A local directory was checked before the model was made, a hub's files were not there yet.
        stored = Inventory.of(reader) if Path(model_config.model).is_dir() else check_headers(reader)
        for finding in tied_head_findings(reader, stored):
            raise CheckpointError(finding)
        zeros = frozenset(_zero_norm_biases(reader))
        inventory = quant_config.inventory.without(zeros)
        add_missing_biases(model, inventory, quant_config.packed_modules_mapping)
        is_draft = any("MTP" in name for name in model_config.architectures)
        LoadGuard(model, model_config, stored, zeros, is_draft)
        super().load_weights(model, model_config)
        fuse_steps(model, self.vllm_config)

    def get_all_weights(self, *args: Any, **kwargs: Any) -> Any:
        return WholeCheckpoint(super().get_all_weights(*args, **kwargs))

    def track_weights_loading(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        try:
            super().track_weights_loading(model, *args, **kwargs)
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint lacks tensors of vLLM's {type(model).__name__}: {error}. It is incomplete, or "
                "config.json is that of another model."
            ) from None

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> Any:
        folder, files, *rest = super()._prepare_weights(*args, **kwargs)
        if (Path(folder) / DESCRIPTION_FILE).exists():
            reader = CheckpointReader(folder)
            files = [str(reader.directory / name) for name in sorted({i.file for i in reader.tensors.values()})]
        return folder, files, *rest


class StreamingLoader(W4A4ModelLoader):
    """The same, with Run:ai's streamer reading the files; its own options are in `model_loader_extra_config`."""

    def __init__(self, load_config: LoadConfig) -> None:
        options = dict(load_config.model_loader_extra_config)
        theirs = {name: options.pop(name) for name in STREAMER_OPTIONS if name in options}
        super().__init__(replace(load_config, model_loader_extra_config=options))
        self.streamer = RunaiModelStreamerLoader(replace(load_config, model_loader_extra_config=theirs))

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        files = self._prepare_weights(source.model_or_path, source.subfolder, source.revision, False, None)[1]
        weights = runai_safetensors_weights_iterator(
            files, self.load_config.use_tqdm_on_load, self.streamer._is_distributed
        )
        return ((source.prefix + name, tensor) for name, tensor in weights)


def _zero_norm_biases(reader: CheckpointReader) -> list[str]:
    """Biases of norms that are all zero, as stored; they cost nothing if the norm gets none."""
    names = (name for name in reader.tensors if name.endswith(f"norm.{BIAS}"))
    return [name for name in names if not bool(reader.load(name).any())]
