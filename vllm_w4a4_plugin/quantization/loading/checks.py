# SPDX-License-Identifier: Apache-2.0
"""The checks of `verify` that are made tensor by tensor while a model loads, and vLLM's own errors in our words."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes
from vllm.logger import init_logger

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.accounting import NPU_BIAS, useless_reason
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.types import QuantType
from vllm_w4a4_plugin.checkpoint.verify import value_finding
from vllm_w4a4_plugin.constants import LOGGER

logger = init_logger(LOGGER)


class TensorChecks:
    """Looks at the tensors that a model is given.

    Args:
        inventory: of the checkpoint, with names as in the files.
        drops_useless: whether tensors that the model is served without are kept from it; many of vLLM's models
            refuse them.
    """

    def __init__(self, inventory: Inventory, drops_useless: bool) -> None:
        self.inventory, self.drops_useless = inventory, drops_useless
        self._current: tuple[str, list[int]] | None = None
        self._error_of_source: Exception | None = None

    def needed(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same pairs without those of which nobody has a use."""
        dropped: Counter[str] = Counter()
        for name, tensor in self._taken(weights):
            reason = useless_reason(name, self.inventory.config)
            if reason == NPU_BIAS or (reason and self.drops_useless):
                dropped[reason] += 1
                continue
            self._current = (name, list(tensor.shape))
            yield name, tensor
        self._current = None
        for reason, count in dropped.items():
            logger.info_once("%d tensors of the checkpoint are not needed: %s", count, reason)

    def check_read(self, name: str, values: torch.Tensor) -> None:
        """Look at the part of a tensor that a model reads; a rank leaves what other ranks read to them.

        Of FLOAT tensors only: those of quantized layers are checked by their parameters.

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        is_float = self.inventory.description.tensors.get(name, QuantType.FLOAT) == QuantType.FLOAT
        if is_float and not useless_reason(name, self.inventory.config):
            with _disable_current_modes():  # looking at a tensor is no use of it
                finding = value_finding(self.inventory, name, values)
            if finding:
                raise CheckpointError(finding)

    def _taken(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        iterator = iter(weights)
        while True:
            try:
                pair = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                self._error_of_source = error
                raise
            yield pair

    @contextmanager
    def in_our_words(self, model: str) -> Iterator[None]:
        """An error that vLLM raises in here while it loads `model` (the name of its class) comes out naming the tensor.

        Errors of reading the weights stay as they are.
        """
        self._current = None
        try:
            yield
        except Exception as error:
            if isinstance(error, CheckpointError) or error is self._error_of_source:
                raise
            lines = str(error).splitlines() or [""]
            raise CheckpointError(
                f"{self._place()}vLLM's {model} cannot load this checkpoint: {type(error).__name__}: {lines[0][:300]}. "
                "Check that config.json and weights belong to one model, and that this version of vLLM can serve it."
            ) from error

    def _place(self) -> str:
        if self._current is None:
            return ""
        name, shape = self._current
        file = f"{self.inventory.tensors[name].file}: " if name in self.inventory.tensors else ""
        return f"{file}tensor {name}, shape {shape}: "
