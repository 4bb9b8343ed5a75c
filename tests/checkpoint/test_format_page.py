# SPDX-License-Identifier: Apache-2.0
"""docs/reference/checkpoint-format.md says of types and tensors what the table of types says."""

import re
from pathlib import Path

from vllm_w4a4_plugin.checkpoint import type_table
from vllm_w4a4_plugin.checkpoint.types import WEIGHT

PAGE = (Path(__file__).parents[2] / "docs/reference/checkpoint-format.md").read_text()
TYPES = PAGE.partition("## Types\n")[2].partition("\n## ")[0]
TENSORS = PAGE.partition("## Tensors\n")[2].partition("\n## ")[0]
BUILT_IN = {spec.name: spec for spec in type_table._BUILT_IN}


def rows() -> dict[str, str]:
    """Type -> the cell with its tensors; of rows with several types, each of them."""
    found = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*?) \|", TYPES, re.MULTILINE)
    return {name: cell for names, cell in found for name in re.findall(r"`(\w+)`", names)}


def test_every_type_with_tensors_has_its_row() -> None:
    assert rows().keys() == {name for name, spec in BUILT_IN.items() if spec.tensors}


def test_rows_list_the_tensors() -> None:
    for name, cell in rows().items():
        listed = {tensor: not optional for tensor, optional in re.findall(r"`(\w+)`(\?)?", cell)}
        expected = {t.suffix: t.required for t in BUILT_IN[name].tensors if t.suffix != WEIGHT}
        assert listed == expected, name


def test_types_known_by_name_are_listed() -> None:
    paragraph = TYPES.partition("known by name only")[2]
    assert set(re.findall(r"`(\w+)`", paragraph)) == {name for name, spec in BUILT_IN.items() if not spec.tensors}


def test_every_tensor_is_described() -> None:
    described = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", TENSORS, re.MULTILINE))))
    suffixes = {tensor.suffix for spec in BUILT_IN.values() for tensor in spec.tensors}
    assert suffixes - described == {"scale_bias", "weight_scale_second", "weight_offset_second"}
    assert "`scale_bias` is for NPU kernels" in TYPES
