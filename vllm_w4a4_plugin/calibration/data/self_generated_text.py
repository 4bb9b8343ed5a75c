# SPDX-License-Identifier: Apache-2.0
"""Calibration text that the model generates itself, so that none has to be downloaded.

Each row starts with a random token of the vocabulary, which makes the rows differ as in LLM-QAT (arXiv 2305.17888), and
continues by sampling from the model's full distribution: without its least likely 5 % the text is smoother than human
text, and the checkpoint worse (docs/explanation/calibration.md). The whole model is in memory meanwhile: block by
block, every token would read all weights again.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CalibrationError
from ..files import save_tensors
from ..model.skeleton import attention_implementation, model_class
from .tokens import FEWEST_ROWS, load_tokenizer

# Longer rows take longer to generate, and leave fewer different beginnings.
ROW_TOKENS = 256
ROWS_AT_ONCE = 64  # more would need more memory for keys and values


@dataclass(frozen=True)
class TextRequest:
    """How much text to generate.

    Attributes:
        rows, length: of the result.
        seed: of first tokens and sampling.
    """

    rows: int
    length: int
    seed: int

    @classmethod
    def of_tokens(cls, tokens: int, length: int, seed: int) -> "TextRequest":
        """At most `tokens` tokens in at least `FEWEST_ROWS` rows of at most `length` and `ROW_TOKENS`."""
        length = min(length, tokens // FEWEST_ROWS, ROW_TOKENS)
        return cls(tokens // length, length, seed)

    @property
    def tokens(self) -> int:
        """In all."""
        return self.rows * self.length


def generate_text(
    directory: Path,
    request: TextRequest,
    vocabulary: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Token ids [rows, length] sampled from a float model; the same for the same seed.

    Args:
        directory: of the model.
        request: how much.
        vocabulary: number of tokens that the model knows, if the tokenizer may have more.
        device: where to run the model: in float32 on CPU, in bfloat16 elsewhere.
        trust_remote_code: run the model's own Python code.
        progress: called with the number of tokens generated so far.
    """
    from transformers import AutoConfig

    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    model: Any = model_class(config).from_pretrained(
        directory,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        attn_implementation=attention_implementation(config),
    )
    model = model.to(device).eval()
    allowed = _ordinary_tokens(load_tokenizer(directory, trust_remote_code))[:vocabulary]
    generator = torch.Generator().manual_seed(request.seed)
    choices = allowed.nonzero().flatten()
    result = torch.empty(request.rows, request.length, dtype=torch.long)
    result[:, :1] = choices[torch.randint(len(choices), (request.rows, 1), generator=generator)]
    done = 0
    for part in result.split(ROWS_AT_ONCE):
        cache = None
        for column in range(1, request.length):
            with torch.no_grad():
                output = model(input_ids=part[:, column - 1 : column].to(device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[:, -1, : len(allowed)].float().cpu().masked_fill_(~allowed, float("-inf"))
            part[:, column : column + 1] = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            progress(done + len(part) * (column + 1))
        done += part.numel()
    return result


def cached_text(directory: Path, request: TextRequest, identity: object, generate: Callable[[], Tensor]) -> Tensor:
    """The result of `generate`, kept in a file for a run that is resumed.

    Args:
        directory: for the file; made if it does not exist.
        request: what is generated.
        identity: what tells the model from others.
        generate: called unless the file exists.

    Raises:
        CalibrationError: the file cannot be written.
    """
    key = hashlib.sha256(repr((identity, request)).encode()).hexdigest()
    file = directory / f"text-{key[:16]}.safetensors"
    if file.exists():
        return load_file(file)["ids"]
    ids = generate()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_tensors({"ids": ids}, file)
    except OSError as error:
        raise CalibrationError(f"{file}: cannot be written: {error}") from None
    return ids


def _ordinary_tokens(tokenizer: Any) -> Tensor:
    """Which tokens of the vocabulary [tokens] are not special, as bool."""
    vocabulary = len(tokenizer)
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[special[special < vocabulary]] = False
    return allowed
