# SPDX-License-Identifier: Apache-2.0
"""Embeddings, scores, and classifiers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from vllm import LLM

from tests.conftest import MICRO
from tests.engine.engines import engine
from tests.engine.oracle import reference_model
from tests.loading import loaded_model
from vllm_w4a4_plugin.checkpoint import CheckpointError

TEXTS = ["what is a large language model?", "the weather", "a model of language that is large"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engine(MICRO, runner="pooling", convert="embed") as llm:
        yield llm


def expected(texts: list[str]) -> torch.Tensor:
    """The last token's hidden state, of length 1."""
    model, tokenizer = reference_model(MICRO), AutoTokenizer.from_pretrained(MICRO)
    with torch.inference_mode():
        states = [model.model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0, -1] for text in texts]
    return torch.nn.functional.normalize(torch.stack(states), dim=-1)


@pytest.mark.engine
@pytest.mark.feature("embeddings and scores (`--runner pooling`)")
def test_embeddings_and_scores(llm: LLM) -> None:
    found = torch.tensor([output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)])
    wanted = expected(TEXTS)
    assert ((found * wanted).sum(-1) > 0.999).all()
    scores = [output.outputs.score for output in llm.score(TEXTS[0], TEXTS[1:], use_tqdm=False)]
    assert scores == pytest.approx((wanted[:1] @ wanted[1:].T)[0].tolist(), abs=0.02)


@pytest.mark.feature(
    "classification (`--runner pooling`), head without weights", refused="the checkpoint lacks score.weight"
)
def test_a_classifier_needs_its_head(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    edit_json("config.json", {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 3})
    with (
        pytest.raises(CheckpointError, match=r"lacks tensors of .*score\.weight"),
        loaded_model(micro_copy, runner="pooling"),
    ):
        pass
