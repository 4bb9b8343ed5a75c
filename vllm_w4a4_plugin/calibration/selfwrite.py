# SPDX-License-Identifier: Apache-2.0
"""Calibration text that the model writes itself, so that nothing has to be downloaded.

Each row starts with a random token of the vocabulary, as LLM-QAT (arXiv 2305.17888) does to make the rows differ, and
goes on by sampling from all of the model's distribution: without its unlikely twentieth the text is smoother than what
people write, and the checkpoint worse (docs/quantize.md). The whole model is in memory meanwhile: block by block, every
token would read all weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Longer rows take longer to write, and begin in fewer ways.
ROW_TOKENS = 256
ROWS_AT_ONCE = 64  # more would cost memory for keys and values


def write_text(
    directory: Path,
    device: str,
    rows: int,
    length: int,
    seed: int,
    trust_remote_code: bool,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Token ids [rows, length] sampled from the float model in `directory`; the same for the same seed.

    Args:
        directory, device, trust_remote_code: of the model.
        rows, length: of the result.
        seed: of first tokens and sampling.
        progress: called with the number of tokens written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=trust_remote_code)
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
    vocabulary = len(tokenizer)
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[special[special < vocabulary]] = False
    choices = allowed.nonzero().flatten()
    result = torch.empty(rows, length, dtype=torch.long)
    result[:, :1] = choices[torch.randint(len(choices), (rows, 1), generator=generator)]
    done = 0
    for part in result.split(ROWS_AT_ONCE):
        cache = None
        for column in range(1, length):
            with torch.no_grad():
                output = model(input_ids=part[:, column - 1 : column].to(device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[:, -1, :vocabulary].float().cpu().masked_fill_(~allowed, float("-inf"))
            part[:, column : column + 1] = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            progress(done + len(part) * (column + 1))
        done += part.numel()
    return result
