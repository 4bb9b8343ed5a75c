# SPDX-License-Identifier: Apache-2.0
"""What oneDNN keeps is bounded for quantized models, unless the user says how many."""

import os
from pathlib import Path

import pytest

from tests.conftest import DESCRIPTION, MICRO
from tests.loading import engine_config
from vllm_w4a4_plugin.platforms.onednn import CAPACITY, FORMER_NAME


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CAPACITY, FORMER_NAME):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_quantized_models() -> None:
    engine_config(MICRO)
    assert os.environ[CAPACITY] == "64"


@pytest.mark.parametrize("name", [CAPACITY, FORMER_NAME])
def test_the_users_number_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    engine_config(MICRO)
    assert [os.environ.get(key) for key in (name, *({CAPACITY, FORMER_NAME} - {name}))] == ["7", None]


def test_other_models(micro_copy: Path) -> None:
    (micro_copy / DESCRIPTION).unlink()
    engine_config(micro_copy, quantization=None)
    assert CAPACITY not in os.environ
