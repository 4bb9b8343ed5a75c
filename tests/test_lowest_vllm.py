# SPDX-License-Identifier: Apache-2.0
"""The lowest vLLM that we declare, 0.23 (the one that vllm-ascend 0.23 pairs with), from its CPU build."""

from pathlib import Path

import pytest

from tests import other_vllm
from tools import npu_environment
from vllm_w4a4_plugin.constants import TESTED_VLLM

LOWEST = f"{TESTED_VLLM[0]}.0"


@pytest.fixture(scope="module")
def lowest_vllm() -> Path:
    assert npu_environment.RELEASES[npu_environment.DEFAULT].vllm == LOWEST
    directory = npu_environment.vllm()
    other_vllm.check_version(directory, LOWEST)
    return directory


def test_every_module_is_imported(lowest_vllm: Path) -> None:
    other_vllm.check_imports(lowest_vllm)


def test_everything_that_needs_no_c_extension(lowest_vllm: Path) -> None:
    other_vllm.check_tests(lowest_vllm)
