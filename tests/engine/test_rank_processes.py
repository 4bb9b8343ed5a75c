# SPDX-License-Identifier: Apache-2.0
"""Row-parallel layers in groups of 1, 2 and 4 real processes, over vLLM's own communication."""

from typing import Any

import pytest
import torch

from tests.engine.ranks import DTYPES, OF_CODES, SIZES, run_all, tokens
from tests.quantization.row_linears import TYPES
from tools.demo import free_port

Results = dict[int, list[dict[Any, torch.Tensor]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Size of the group -> outputs of each process."""
    processes = run_all(free_port(), tmp_path_factory.mktemp("ranks"))
    for size in SIZES:
        assert [process[size][0] for process in processes] == [rank % size for rank in range(max(SIZES))]
    return {size: [process[size][1] for process in processes] for size in SIZES}


def assert_those_of_one_rank(results: Results, key: tuple[str, bool, torch.dtype]) -> None:
    """To the bit, on every rank of every size; tokens that are not finite are NaN or infinite everywhere."""
    whole = results[1][0][key]
    is_finite = tokens(key[2]).isfinite().all(-1)
    assert whole[is_finite].isfinite().all()
    assert len(whole[is_finite].unique()) > 10
    for size in SIZES:
        for found in results[size]:
            assert torch.equal(found[key][is_finite], whole[is_finite])
            assert not found[key][~is_finite].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", OF_CODES)
def test_quantized_activations_are_those_of_one_rank(results: Results, kind: str, dtype: torch.dtype) -> None:
    """Weights of ones and zeros give the activations, code times scale, each from one rank."""
    assert_those_of_one_rank(results, (kind, True, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_outputs_are_those_of_one_rank(results: Results, kind: str, dtype: torch.dtype) -> None:
    assert_those_of_one_rank(results, (kind, False, dtype))
