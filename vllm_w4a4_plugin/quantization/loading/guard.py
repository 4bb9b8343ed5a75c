# SPDX-License-Identifier: Apache-2.0
"""Every load of weights into a model, first or later, ends complete or leaves a model that refuses to run."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.models.utils import PPMissingLayer

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.accounting import useless_reason
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.model_config import HEAD, is_tied
from vllm_w4a4_plugin.checkpoint.types import WEIGHT
from vllm_w4a4_plugin.constants import LOGGER
from vllm_w4a4_plugin.quantization.experts import AscendW4A4ExpertsMethod

from .checks import TensorChecks
from .reads import ReadTracker

try:
    from vllm.model_executor.models.utils import StageMissingLayer
except ImportError:  # vLLM 0.23
    StageMissingLayer = PPMissingLayer

logger = init_logger(LOGGER)

Weights = Iterable[tuple[str, torch.Tensor]]


class WholeCheckpoint:
    """All tensors of a checkpoint, as opposed to a portion: what is missing will not come later."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._weights)


class LoadGuard:
    """Stands in for `model.load_weights`, whoever calls it: the loader, vLLM's reload, or a trainer.

    A trainer loads in place and in as many portions as it likes. vLLM's layers cannot take that: some drop the weight
    that they were loaded with once it is packed. So the guard opens vLLM's layerwise reload for them, and closes it
    when all tensors have come. vLLM opens and closes one itself for its own ways to bring weights.

    Args:
        model: gets the guard's `load_weights`, and a hook that raises in place of computing with half its weights.
        model_config: vLLM's.
        inventory: of the checkpoint, with names as in the files.
        zero_biases: tensors that hold zeros only and have no parameter.
        is_draft: whether the model predicts tokens for another one, with the layers that the other is served without.
            It may leave the tensors of the checkpoint that it has no use for.
    """

    def __init__(
        self,
        model: Any,
        model_config: ModelConfig,
        inventory: Inventory,
        zero_biases: frozenset[str],
        is_draft: bool = False,
    ) -> None:
        self.model, self.model_config, self.zero_biases = model, model_config, zero_biases
        self.config, self.is_draft = inventory.config, is_draft
        self.checks = TensorChecks(inventory, drops_useless=not is_draft)
        self.needed: frozenset[str] = frozenset()
        self.was_reloaded = False
        self.tracker = ReadTracker(self.checks.check_read)
        self.is_open = False
        self.fault = ""
        self._load: Callable[[Weights], set[str]] = model.load_weights
        model.load_weights = self.load_weights
        model.register_forward_pre_hook(self._before_forward)

    def load_weights(self, weights: Weights) -> set[str]:
        """Load `weights`, names and tensors as in the checkpoint.

        Raises:
            CheckpointError: a tensor was of no use, or one that the first load needed is missing. Whatever is raised,
                the model refuses to run until a later load succeeds.
        """
        self.was_reloaded = bool(self.needed)
        is_vllms, has_begun = self._vllms_reload()
        if not self.is_open and not has_begun:
            self.tracker = ReadTracker(self.checks.check_read)
            if self.needed and not is_vllms:
                initialize_layerwise_reload(self.model)
                self.is_open = True
        self.fault = "a load of weights was interrupted"
        try:
            with self.checks.in_our_words(type(self.model).__name__):
                return self._load_all(weights, in_portions=self.is_open or is_vllms)
        except Exception as error:
            self.fault = f"the last load of weights failed: {error}"
            self._abandon()
            raise

    def _vllms_reload(self) -> tuple[bool, bool]:
        """Whether vLLM has opened a reload itself, and whether tensors have come since.

        Its `reload_weights` calls `load_weights` once in a reload. Its weight transfer does for each tensor.
        """
        if self.is_open or not self.needed:
            return False, False
        infos = [get_layerwise_info(layer) for layer in self.model.modules()]
        is_vllms = any(info.can_load() for info in infos)
        return is_vllms, is_vllms and any(info.load_numel > 0 or not info.can_load() for info in infos)

    def _load_all(self, weights: Weights, in_portions: bool) -> set[str]:
        """What `load_weights` does once a reload is open, in which more portions may come if this is not the last."""
        with self.tracker:
            loaded = self._load(self.tracker.watch(self.checks.needed(self._with_a_place(weights))))
        missing = sorted(self.needed - self.tracker.offered)
        if missing and in_portions and not isinstance(weights, WholeCheckpoint):
            self.fault = f"{len(missing)} of {len(self.needed)} tensors have still to be loaded, e.g. {missing[0]}"
            return loaded
        self._refuse_incomplete(missing)
        if self.is_open:
            with self.tracker:
                finalize_layerwise_reload(self.model, self.model_config)
            self.is_open = False
        self._refuse_unused(self.tracker)
        self.needed = self.needed or frozenset(self.tracker.read)
        self.fault = ""
        return loaded

    def _abandon(self) -> None:
        """Forget what a failed reload has brought, so that the next one starts from nothing."""
        self.tracker = ReadTracker(self.checks.check_read)
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0
        if self.is_open:
            finalize_layerwise_reload(self.model, self.model_config)
            self.is_open = False

    def _with_a_place(self, weights: Weights) -> Weights:
        """All but a tied head that the model has no module for (vLLM's Gemma), and biases that are zero."""
        has_head = hasattr(self.model, HEAD)
        for name, tensor in weights:
            if name == f"{HEAD}.{WEIGHT}" and not has_head and is_tied(self.config):
                continue
            if name not in self.zero_biases:
                yield name, tensor
            elif bool(tensor.any()):
                raise CheckpointError(
                    f"tensor {name}: the norm's bias was all zero when the model was first loaded, so the model has no "
                    "place for the other values that come now. Restart vLLM with the new weights."
                )

    def _refuse_unused(self, tracker: ReadTracker) -> None:
        unused = sorted(tracker.offered - tracker.read)
        wrong = [name for name in unused if not self._may_stay_unused(name)]
        if wrong:
            more = f" (and {len(wrong) - 1} more: {', '.join(wrong[1:6])})" if wrong[1:] else ""
            raise CheckpointError(
                f"tensor {wrong[0]} was of no use to vLLM's {type(self.model).__name__}, which dropped it{more}. The "
                "model would compute other numbers than the one that was quantized; quantize it without this tensor."
            )
        if unused:
            logger.info_once("%d tensors of the checkpoint are not needed, e.g. %s", len(unused), unused[0])

    def _may_stay_unused(self, name: str) -> bool:
        if self.is_draft or useless_reason(name, self.config) or (name == f"{HEAD}.{WEIGHT}" and is_tied(self.config)):
            return True
        parts = name.split(".")
        for end in range(1, len(parts)):
            try:
                module = self.model.get_submodule(".".join(parts[:end]))
            except AttributeError:
                return False
            if isinstance(module, (PPMissingLayer, StageMissingLayer)):
                return True  # another rank has it, or the model is served without it
            experts = getattr(module, "routed_experts", module)  # vLLM 0.23 has no runner around them
            if isinstance(experts, RoutedExperts):
                return _is_of_another_rank(experts, parts[end])
        return False

    def _refuse_incomplete(self, missing: list[str]) -> None:
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise CheckpointError(
                f"tensor {missing[0]}{more}: loaded before, but not among the new weights. Load all of them together."
            )

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        if not self.fault:
            return
        raise CheckpointError(f"The model has no complete weights: {self.fault}")


def _is_of_another_rank(experts: Any, expert: str) -> bool:
    """Whether ranks share the experts of a layer and this one is not on this rank."""
    method = experts.quant_method
    expert_map = method.expert_map if isinstance(method, AscendW4A4ExpertsMethod) else experts.expert_map
    return expert_map is not None and expert.isdecimal() and int(expert_map[int(expert)]) < 0
