# SPDX-License-Identifier: Apache-2.0
"""Everything that decides the result of a run."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from vllm_w4a4_plugin.checkpoint import QuantType

from ..data.held_out import CalibrationText, hold_out
from ..errors import CalibrationError
from ..model.streamed import StreamedModel
from ..recipe import Recipe
from .start_from import StartingPoint
from .work import VERSION_KEY, code_version, fingerprint


@dataclass(frozen=True)
class Settings:
    """Numbers and switches of a run.

    Attributes:
        seed: of the flat rotations and of the order in which distillation uses the text.
        gradients: weigh tokens by the squared gradient of the loss (`fisher`).
        distill: steps of training towards the float model's predictions.
        head: quant type of the output head.
    """

    seed: int = 0
    gradients: bool = False
    distill: int = 0
    head: str = QuantType.FLOAT


@dataclass(frozen=True)
class Job:
    """What is quantized, and how.

    Attributes:
        model: the float model.
        recipe: quant types; not used with `start_from`.
        settings: further settings.
        ids: calibration tokens [rows, length].
        start_from: a checkpoint made from `model`; its blocks are taken as they are and only distilled.

    Raises:
        CalibrationError: the text has tokens that the model does not know.
    """

    model: StreamedModel
    recipe: Recipe
    settings: Settings
    ids: Tensor
    start_from: StartingPoint | None = None

    def __post_init__(self) -> None:
        vocabulary = len(self.model.skeleton.get_input_embeddings().weight)
        if self.ids.max() >= vocabulary:
            raise CalibrationError(
                f"{self.model.directory}: the tokenizer gives token {self.ids.max()}, but the embedding has "
                f"{vocabulary} rows. The tokenizer's files belong to another model."
            )

    @cached_property
    def text(self) -> CalibrationText:
        """The calibration text, with rows held out."""
        return hold_out(self.ids, len(self.model.skeleton.get_input_embeddings().weight), self.settings.seed)

    def identity(self) -> Mapping[str, Any]:
        """What tells this run from others, as JSON values; an interrupted run is resumed only if all are equal."""
        return {
            VERSION_KEY: code_version(),
            "model": fingerprint(self.model.directory),
            "starting point": fingerprint(self.start_from.reader.directory) if self.start_from else [],
            "calibration text": hashlib.sha256(self.ids.numpy().tobytes()).hexdigest(),
            "recipe": [
                sorted(map(list, self.recipe.types.items())),
                list(map(list, self.recipe.exceptions)),
                self.recipe.experts,
            ],
            "settings": asdict(self.settings),
        }
