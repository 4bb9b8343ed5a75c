# SPDX-License-Identifier: Apache-2.0
"""How long distillation trains, on what, and with which step sizes."""

from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor

from ..model.structure import group_sizes

DEFAULT_STEPS = 16  # a minute or two and at most 3 GB, for models whose blocks hold at most DEFAULT_UP_TO parameters
DEFAULT_UP_TO = 300_000_000
STEP_TOKENS = 256  # longer rows of text are cut; the time of a step is proportional to it
RATES = {"log_scale": 1e-3, "log_clip": 2e-3, "left_change": 5e-4, "right_change": 5e-4, "original": 1e-3}
"""Largest step of each kind of parameter, by the last part of its name; all are relative changes. `original` is the
name that `torch.nn.utils.parametrize` gives to the parameter behind a norm's weight."""
WARM_UP = 0.25  # of all steps


def default_steps(config: Any) -> int:
    """Steps if the user does not say: a few for models that easily fit into memory as a whole, none for larger ones.

    Args:
        config: transformers' text config.
    """
    parameters = config.num_hidden_layers * sum(out * n for out, n in group_sizes(config).values())
    return DEFAULT_STEPS if parameters <= DEFAULT_UP_TO else 0


@dataclass(frozen=True)
class Schedule:
    """The course of a training.

    Attributes:
        steps: how many.
        seed: of the order of rows; none is repeated before all others have been used.
    """

    steps: int
    seed: int

    def rows(self, count: int) -> Tensor:
        """For each step, which of `count` rows it trains on."""
        epochs = [
            torch.randperm(count, generator=torch.Generator().manual_seed(self.seed * 1009 + epoch))
            for epoch in range(-(-self.steps // count))
        ]
        return torch.cat(epochs)[: self.steps]

    def factor(self, step: int) -> float:
        """By which the rates are multiplied: linear warm-up times a cosine that falls to zero."""
        warm_up = min(1.0, (step + 1) / max(1.0, WARM_UP * self.steps))
        return warm_up * (1 + cos(pi * step / self.steps)) / 2


def shorter_rows(ids: Tensor, length: int) -> Tensor:
    """Rows of at most `length` tokens, all equally long, cut from rows [rows, n]."""
    parts = -(-ids.shape[1] // length)
    length = ids.shape[1] // parts
    return ids[:, : parts * length].reshape(-1, length)
