# SPDX-License-Identifier: Apache-2.0
"""The options of a quantization. Imports no torch."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import CalibrationError

DEFAULT_RECIPE = "tutorial"


class QuantizeOptions(BaseModel):
    """Options of `calibration.quantize`; the command line has the same, as `--calib-file` for `calib_file`.

    Attributes:
        calib_file: calibration text: .json (array of strings), .jsonl or .txt. Without it, the model generates text.
        calib_tokens: use at most so many tokens.
        seq_len: tokens per row of text; text that the model generates has at most 256.
        recipe: a recipe's name or a .yaml file; None is `DEFAULT_RECIPE`.
        keep_float: patterns of full names of layers that are not quantized.
        head: quant type of the output head of a model that does not tie it to the embedding: FLOAT, W8A8_DYNAMIC, or
            None for that of `start_from`, else FLOAT.
        start_from: a checkpoint made from the model, here or by msModelSlim, that is only distilled.
        distill: steps of training towards the float model's predictions; None is a few for small models, else 0.
        gradients: weigh tokens by the squared gradient of the loss.
        seed: of rotations and generated text.
        device: "cpu", "cuda:1", "npu", ...; several, separated by commas, share the work.
        activations_on_disk: keep the activations of a block in files next to the output instead of in memory.
        resume: continue an interrupted run at its last finished block.
        trust_remote_code: run the model's own Python code.

    Raises:
        CalibrationError: a value is out of range, an option is unknown, or options exclude each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    calib_file: Path | None = None
    calib_tokens: int = Field(16384, ge=512)
    seq_len: int = Field(512, ge=16)
    recipe: str | None = None
    keep_float: tuple[str, ...] = ()
    head: Literal["FLOAT", "W8A8_DYNAMIC"] | None = None
    start_from: Path | None = None
    distill: int | None = Field(None, ge=0)
    gradients: bool = False
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = Field("cpu", min_length=1)
    activations_on_disk: bool = False
    resume: bool = False
    trust_remote_code: bool = False

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise CalibrationError("; ".join(_problem(entry) for entry in error.errors())) from None
        if not self.start_from:
            return
        if self.recipe or self.keep_float or self.gradients:
            raise CalibrationError(
                "`start_from` takes each layer as that checkpoint has it: leave out `recipe`, `keep_float` and "
                "`gradients`."
            )
        if self.distill == 0:
            raise CalibrationError("`start_from` only distils: set `distill` to a number of steps above 0.")


def _problem(entry: Any) -> str:
    name = entry["loc"][0]
    if entry["type"] == "extra_forbidden":
        return f"`{name}` is not an option; there are {', '.join(QuantizeOptions.model_fields)}."
    return f"`{name}`: {entry['msg'][0].lower()}{entry['msg'][1:]}, found {entry['input']!r}."
