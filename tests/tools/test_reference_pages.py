# SPDX-License-Identifier: Apache-2.0
"""The pages that are made from the code are those that the code would make now."""

import sys

import pytest

from tools import reference_pages
from vllm_w4a4_plugin.catalogue import entries
from vllm_w4a4_plugin.cli import COMMANDS


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse writes its help in another form from Python 3.13 on")
def test_pages_are_up_to_date() -> None:
    assert list(reference_pages.stale()) == [], "run: python tools/reference_pages.py"


def test_the_pages_have_everything() -> None:
    command_line, errors = reference_pages.command_line(), reference_pages.errors()
    assert all(f"\n## vllm-w4a4 {name}\n" in command_line for name in COMMANDS)
    assert all(f"\n### {entry.code}\n" in errors for entry in entries())


def test_markdown_shows_a_message_as_it_is() -> None:
    assert reference_pages._escaped("no *.safetensors, see `a_b*` [c]") == "no \\*.safetensors, see `a_b*` \\[c\\]"
