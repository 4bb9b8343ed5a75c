# SPDX-License-Identifier: Apache-2.0
"""Embeddings, scores, and classifiers."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from vllm import LLM, PoolingParams

from tests.conftest import DESCRIPTION, MICRO
from tests.engine.engines import engine
from tests.engine.oracle import reference_model
from tests.loading import loaded_model
from vllm_w4a4_plugin.checkpoint import CheckpointError

TEXTS = ["what is a large language model?", "the weather", "a model of language that is large"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engine(MICRO, runner="pooling", convert="embed") as llm:
        yield llm


def hidden_states(texts: list[str]) -> list[torch.Tensor]:
    """Of each text those after the last norm, float32 [tokens, hidden]."""
    model, tokenizer = reference_model(MICRO), AutoTokenizer.from_pretrained(MICRO)
    with torch.inference_mode():
        return [model.model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0] for text in texts]


def expected(texts: list[str]) -> torch.Tensor:
    """The last token's hidden state, of length 1."""
    return torch.nn.functional.normalize(torch.stack([states[-1] for states in hidden_states(texts)]), dim=-1)


@pytest.mark.engine
@pytest.mark.feature("embeddings and scores (`--runner pooling`)")
def test_embeddings_and_scores(llm: LLM) -> None:
    found = torch.tensor([output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)])
    wanted = expected(TEXTS)
    assert ((found * wanted).sum(-1) > 0.999).all()
    scores = [output.outputs.score for output in llm.score(TEXTS[0], TEXTS[1:], use_tqdm=False)]
    assert scores == pytest.approx((wanted[:1] @ wanted[1:].T)[0].tolist(), abs=0.02)


@pytest.fixture
def head(micro_copy: Path, edit_json: Callable[..., None], edit_tensors: Callable[..., None]) -> torch.Tensor:
    """The weights of a head for three classes, which the copy has instead of its output head."""
    weight = torch.randn(3, 192, generator=torch.Generator().manual_seed(0))
    edit_json("config.json", {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 3})
    edit_json(DESCRIPTION, {"score.weight": "FLOAT"}, remove=("lm_head.weight",))
    edit_tensors({"score.weight": weight}, remove=("lm_head.weight",))
    return weight


@pytest.mark.engine
@pytest.mark.feature("classification (`--runner pooling`), head with weights")
def test_a_head_with_weights(micro_copy: Path, head: torch.Tensor) -> None:
    wanted = torch.stack([(states[-1] @ head.T).softmax(-1) for states in hidden_states(TEXTS)])
    with engine(micro_copy, runner="pooling") as llm:
        classes = [output.outputs.probs for output in llm.classify(TEXTS, use_tqdm=False)]
    assert torch.allclose(torch.tensor(classes), wanted, atol=0.02)


@pytest.mark.engine
@pytest.mark.feature("rewards (`--runner pooling`), values for each token", flag="W4A4_COMMANDS")
@pytest.mark.skipif(os.environ.get("W4A4_COMMANDS") != "1", reason="a minute of CI: W4A4_COMMANDS=1 runs it")
def test_values_of_a_head_for_each_token(micro_copy: Path, head: torch.Tensor) -> None:
    """As reward models use them: not turned into probabilities."""
    with engine(micro_copy, runner="pooling", pooler_config={"task": "token_classify"}) as llm:
        raw = PoolingParams(use_activation=False)
        outputs = llm.encode(TEXTS, raw, pooling_task="token_classify", use_tqdm=False)
    for output, states in zip(outputs, hidden_states(TEXTS), strict=True):
        wanted = states @ head.T
        assert output.outputs.data.shape == wanted.shape
        assert (output.outputs.data - wanted).abs().median() < 0.02 * wanted.abs().median()


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
