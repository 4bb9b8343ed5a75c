# SPDX-License-Identifier: Apache-2.0
"""Row-parallel layers in groups of 1, 2 and 4 real processes, over vLLM's own communication."""

from typing import Any

import pytest
import torch

from tests.engine.ranks import DTYPES, KINDS, SIZES, run_all, tokens
from tests.linears import relative_error
from tools.demo import free_port

Results = dict[int, list[dict[Any, torch.Tensor]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Size of the group -> outputs of each process."""
    processes = run_all(free_port(), tmp_path_factory.mktemp("ranks"))
    for size in SIZES:
        assert [process[size][0] for process in processes] == [rank % size for rank in range(max(SIZES))]
    return {size: [process[size][1] for process in processes] for size in SIZES}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_activations_are_those_of_one_rank_to_the_bit(
    results: Results, kind: str, dtype: torch.dtype
) -> None:
    """Weights of ones and zeros give the activations, code times scale, each from one rank.

    On one rank vLLM's kernels for W8A8_DYNAMIC in bfloat16 may do the quantization, with roundings of their own.
    """
    key = (kind, True, dtype)
    whole = results[1][0][key]
    is_finite = tokens(dtype).isfinite().all(-1)
    assert whole[is_finite].isfinite().all()
    assert whole[~is_finite].isnan().all()
    assert len(whole[0].unique()) > (10 if kind.startswith("W4A4") else 40)
    whole = results[2][0][key]
    for size in (4, 2) if (kind, dtype) == ("W8A8_DYNAMIC", torch.bfloat16) else SIZES:
        for found in results[size]:
            assert torch.equal(found[key].nan_to_num(nan=1e9), whole.nan_to_num(nan=1e9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_one_rank(results: Results, kind: str, dtype: torch.dtype) -> None:
    """Up to the summation over ranks, in the output's dtype."""
    key = (kind, False, dtype)
    is_finite = tokens(dtype).isfinite().all(-1)
    whole = results[1][0][key][is_finite]
    for size in SIZES:
        for found in results[size]:
            assert relative_error(found[key][is_finite], whole) < (1e-6 if dtype == torch.float32 else 2**-7)
            assert found[key][~is_finite].isnan().all()
