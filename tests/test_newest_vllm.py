# SPDX-License-Identifier: Apache-2.0
"""The newest vLLM that we declare, from its sources: there is no CPU build of it yet."""

from pathlib import Path

import pytest

from tests import other_vllm
from tools import npu_environment
from vllm_w4a4_plugin.constants import TESTED_VLLM

NEWEST = f"{TESTED_VLLM[1]}.0"


@pytest.fixture(scope="module")
def newest_vllm() -> Path:
    directory = npu_environment.vllm_sources(NEWEST)
    other_vllm.check_version(directory, NEWEST)
    return directory


def test_every_module_is_imported(newest_vllm: Path) -> None:
    other_vllm.check_imports(newest_vllm)


def test_everything_that_needs_no_c_extension(newest_vllm: Path) -> None:
    other_vllm.check_tests(newest_vllm)
