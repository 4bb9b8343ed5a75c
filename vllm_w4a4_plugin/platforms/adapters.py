# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in batches that hold requests without one.

vLLM's operators for CPUs take the adapter of every token from a list by its number. That of a token without an adapter
is -1, which is the last of the list: a request for the model itself is answered by some adapter as soon as another
request of its batch has one. Drop this when `PunicaWrapperCPU` leaves those tokens alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


@contextmanager
def unchanged_without_adapter(y: torch.Tensor, adapters: torch.Tensor) -> Iterator[None]:
    """The rows of `y` [..., features] whose number in `adapters` [rows] is negative are afterwards what they were."""
    rows = (adapters < 0).nonzero().flatten()
    flat = y.view(-1, y.shape[-1])
    before = flat[rows]
    yield
    flat[rows] = before


class AdaptersOnCpu(PunicaWrapperCPU):
    """Adds what an adapter adds to the tokens that have one."""

    def add_lora_embedding(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        with unchanged_without_adapter(y, self.token_lora_indices):
            super().add_lora_embedding(y, *args, **kwargs)

    def add_lora_linear(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        with unchanged_without_adapter(y, self.token_lora_indices):
            super().add_lora_linear(y, *args, **kwargs)

    def add_lora_logits(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        with unchanged_without_adapter(y, self.sampler_indices):
            super().add_lora_logits(y, *args, **kwargs)
