# SPDX-License-Identifier: Apache-2.0
"""An output head that is quantized in the checkpoint, in vLLM's own head layer, without an engine."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers import vocab_parallel_embedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from tests.heads import int8_head, logits_by_formula, put_head
from tests.linears import load, open_config
from tests.loading import loaded_model
from tests.quantization.linears import IN, Linear
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader
from vllm_w4a4_plugin.quantization.config import AscendW4A4Config
from vllm_w4a4_plugin.quantization.loading.biases import add_missing_biases
from vllm_w4a4_plugin.quantization.stored_head import StoredHeadMethod

pytestmark = pytest.mark.usefixtures("vllm_context")

TOKENS = 70  # vLLM makes 128 rows of them, so that of two ranks one has 6 tokens and 58 rows of padding


def by_formula(x: torch.Tensor, stored: Linear) -> torch.Tensor:
    return logits_by_formula(x, stored.weight, stored.weight_scale)


@pytest.fixture
def rank_of_head(monkeypatch: pytest.MonkeyPatch, at_rank: Callable[[int, int], None]) -> Callable[[int, int], None]:
    def pretend(rank: int, size: int) -> None:
        at_rank(rank, size)
        for name, value in (("rank", rank), ("world_size", size)):
            monkeypatch.setattr(vocab_parallel_embedding, f"get_tensor_model_parallel_{name}", lambda v=value: v)

    pretend(0, 1)
    return pretend


def head_layer(directory: Path, stored: Linear, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> Any:
    """vLLM's head, not loaded, of a checkpoint with one linear."""
    config = open_config(AscendW4A4Config(), directory, {"lm_head": stored})
    return ParallelLMHead(tokens, IN, params_dtype=dtype, quant_config=config, prefix="lm_head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_logits_are_those_of_the_formula(
    tmp_path: Path, rank_of_head: Any, dtype: torch.dtype, rank: int, size: int
) -> None:
    stored = Linear(TOKENS, "W8A8_DYNAMIC", 3)
    rank_of_head(rank, size)
    head = load(head_layer(tmp_path, stored, dtype), {None: stored})
    x = torch.randn(5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = head.quant_method.apply(head, x)
    first = 64 * rank
    expected = by_formula(x, stored)[:, first : first + found.shape[1]]
    assert isinstance(head.quant_method, StoredHeadMethod)
    assert found.shape == (5, 128 // size)
    assert found.dtype == dtype
    limit = 2**-7 if dtype is torch.bfloat16 else 1e-5
    assert (found[:, : expected.shape[1]].double() - expected).norm() < limit * expected.norm()
    assert torch.equal(found[:, expected.shape[1] :], torch.zeros_like(found[:, expected.shape[1] :]))


def test_tokens_that_are_no_row_after_row(tmp_path: Path, rank_of_head: Any) -> None:
    stored = Linear(TOKENS, "W8A8_DYNAMIC", 3)
    head = load(head_layer(tmp_path, stored), {None: stored})
    x = torch.randn(IN, 5, generator=torch.Generator().manual_seed(1)).T
    assert torch.allclose(head.quant_method.apply(head, x)[:, :TOKENS].double(), by_formula(x, stored), atol=1e-4)


def test_a_bias_that_vllms_model_lacks(tmp_path: Path, rank_of_head: Any) -> None:
    stored = Linear(TOKENS, "W8A8_DYNAMIC", 3, bias=True)
    head = head_layer(tmp_path, stored)
    model = torch.nn.Module()
    model.lm_head = head
    add_missing_biases(model, open_config(AscendW4A4Config(), tmp_path, {"lm_head": stored}).inventory, {})
    load(head, {None: stored})
    x = torch.randn(5, IN, generator=torch.Generator().manual_seed(1))
    expected = by_formula(x, stored) + stored.bias.double()  # type: ignore[union-attr]
    assert torch.allclose(head.quant_method.apply(head, x)[:, :TOKENS].double(), expected, atol=1e-4)
    plain = head.quant_method.apply(head, x, torch.zeros(128))
    assert torch.allclose(plain[:, :TOKENS].double(), by_formula(x, stored), atol=1e-4)


def test_a_head_without_one_of_its_tensors_is_refused(tmp_path: Path, rank_of_head: Any) -> None:
    stored = Linear(TOKENS, "W8A8_DYNAMIC", 3)
    head = head_layer(tmp_path, stored)
    incomplete = SimpleNamespace(tensors=lambda: {"weight": stored.weight})
    with pytest.raises(CheckpointError, match=r"lm_head: 0 of 128 rows of weight_scale were loaded"):
        load(head, {None: incomplete})


def test_another_number_of_tokens_is_refused(tmp_path: Path, rank_of_head: Any) -> None:
    stored = Linear(TOKENS, "W8A8_DYNAMIC", 3)
    with pytest.raises(CheckpointError, match=r"lm_head.*weight: expected 71 rows.*found 70"):
        head_layer(tmp_path, stored, tokens=71)
    head = head_layer(tmp_path, stored)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected 70 rows.*found shape \[69, 192\]"):
        head.weight.weight_loader(head.weight, stored.weight[:69])


@pytest.mark.parametrize("kind", ["W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC"])
def test_other_types_are_refused(tmp_path: Path, rank_of_head: Any, kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"output heads of quant type {kind}.*FLOAT, W8A8_DYNAMIC"):
        head_layer(tmp_path, Linear(TOKENS, kind, 3))


def test_a_model_computes_its_logits_with_the_head_and_takes_another(micro_copy: Path) -> None:
    tensors = int8_head()
    directory = put_head(micro_copy, tensors)
    hidden = torch.randn(4, 192, generator=torch.Generator().manual_seed(1))
    reader = CheckpointReader(directory)
    others = {name: reader.load(name) for name in reader.tensors if name not in tensors}
    with loaded_model(directory, dtype="float32") as model:
        for head in (tensors, int8_head(1)):
            if head is not tensors:
                model.load_weights(iter({**others, **head}.items()))
            expected = logits_by_formula(hidden, head["lm_head.weight"], head["lm_head.weight_scale"])
            assert (model.compute_logits(hidden).double() - expected).norm() < 1e-5 * expected.norm()
        table = model.lm_head.quant_method.report.table()
    rows = [line.split() for line in table.splitlines() if line.startswith("W8A8_DYNAMIC")]
    assert [row[:2] for row in rows] == [["W8A8_DYNAMIC", "3"]]  # two o_proj and the head


def test_a_tied_head_is_refused(micro_copy: Path, edit_json: Callable[..., None]) -> None:
    put_head(micro_copy, int8_head())
    edit_json("config.json", {"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"layer lm_head: quant type W8A8_DYNAMIC, but config\.json ties"):
        AscendW4A4Config().maybe_update_config(str(micro_copy))
