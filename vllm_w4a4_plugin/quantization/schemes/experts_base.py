# SPDX-License-Identifier: Apache-2.0
"""What the schemes of experts on CPUs and on NPUs share."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from vllm_w4a4_plugin.checkpoint.experts import ExpertsPlan
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec

from .base import Layer

GATE_UP, DOWN = (0, 1), (2,)
"""Places of the projections of one parameter among the three of an expert."""
NAMES = {GATE_UP: "w13", DOWN: "w2"}
"""What vLLM calls gate and up, and down."""


class BaseExpertsScheme(ABC):
    """Parameters and computation of the routed experts of one layer.

    Parameters are called as vLLM expects them: `w13_` and the tensor's suffix for gate and up, `w2_` for down.

    Args:
        plan: of the layer; its type is quantized.
        on_packed: called after each weight tensor that was packed.

    Attributes:
        packs_weights: for the progress, which counts weights that are packed.
        sent_bytes: bytes per token that a rank sends to each other one.
    """

    packs_weights = True
    sent_bytes = 0

    def __init__(self, plan: ExpertsPlan, on_packed: Callable[[], None]) -> None:
        self.plan, self.on_packed = plan, on_packed

    @property
    def spec(self) -> LinearSpec:
        """That of gate and up."""
        assert self.plan.spec is not None
        return self.plan.spec

    @property
    def down_spec(self) -> LinearSpec:
        """That of down."""
        assert self.plan.down_spec is not None
        return self.plan.down_spec

    def process_weights_after_loading(self, layer: Layer) -> None:  # noqa: B027 - not all schemes have something to do
        """Prepare for the next computation; called after each load, when all parameters are filled."""

    def fill_dummy_scales(self, layer: Layer, scale: float) -> None:  # noqa: B027 - most hold scales as they are
        """Set weight scales that are not stored as numbers, for `--load-format dummy`."""

    @property
    @abstractmethod
    def operator(self) -> str:
        """The operators that run, for the start-up table."""

    @property
    @abstractmethod
    def remark(self) -> str:
        """Anything that a user should know about how these experts run, "" if nothing."""

    @abstractmethod
    def weight_bytes(self, layer: Layer) -> int:
        """Resident bytes of the weights on this rank."""


def zeros(*shape: int) -> torch.Tensor:
    """Storage of a float32 parameter."""
    return torch.zeros(shape, dtype=torch.float32)
