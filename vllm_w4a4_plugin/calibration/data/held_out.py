# SPDX-License-Identifier: Apache-2.0
"""Which rows of calibration text are held out, to find out whether calibration helps on text that it has not seen."""

from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT = 16  # one row of so many
TOKENS_PER_DISTINCT = 32  # ordinary text has a new token more often than this, up to MANY_DISTINCT of them
FEW_DISTINCT, MANY_DISTINCT = 64, 512


@dataclass(frozen=True)
class CalibrationText:
    """Calibration text as it is used.

    Attributes:
        rows: token ids [rows, length] for statistics and training.
        held_out: token ids [rows, length] for comparisons only; without rows if the text has a single one.
        distinct: number of different tokens in the text.
        repeats: whether these are so few that rows of the text would say nothing about other text; `held_out` are then
            random tokens of the vocabulary.
    """

    rows: Tensor
    held_out: Tensor
    distinct: int
    repeats: bool

    @property
    def ids(self) -> Tensor:
        """All rows, those held out at the end."""
        return torch.cat([self.rows, self.held_out])


def hold_out(ids: Tensor, vocabulary: int, seed: int) -> CalibrationText:
    """Divide calibration text.

    Args:
        ids: token ids [rows, length].
        vocabulary: number of tokens that the model knows.
        seed: of random tokens.
    """
    distinct = len(ids.unique())
    count = max(1, round(len(ids) / HELD_OUT))
    if distinct < fewest_distinct(ids.numel(), vocabulary):
        generator = torch.Generator().manual_seed(seed)
        held_out = torch.randint(vocabulary, (count, ids.shape[1]), generator=generator)
        return CalibrationText(ids, held_out, distinct, True)
    if len(ids) == 1:
        count = 0
    chosen = torch.zeros(len(ids), dtype=torch.bool)
    chosen[[int((i + 0.5) * len(ids) / count) for i in range(count)]] = True
    return CalibrationText(ids[~chosen], ids[chosen], distinct, False)


def fewest_distinct(tokens: int, vocabulary: int) -> int:
    """How many different tokens a text of this length has at least, unless it repeats itself."""
    return min(max(FEW_DISTINCT, min(tokens // TOKENS_PER_DISTINCT, MANY_DISTINCT)), vocabulary // 4)


def text_warnings(text: CalibrationText, source: str) -> list[str]:
    """What the user should know about calibration text.

    Args:
        text: the text.
        source: name of it for the message.
    """
    if not text.repeats:
        return []
    found = f"{text.distinct} different token{'s' if text.distinct != 1 else ''} among {text.rows.numel()}"
    return [
        f"{source}: only {found}: this text repeats itself and is hardly fit for calibration. Give more varied text; "
        "with this one, layers are calibrated only where that helps on random tokens."
    ]
