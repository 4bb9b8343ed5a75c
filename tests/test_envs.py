# SPDX-License-Identifier: Apache-2.0
"""Environment variables: what is read, what the documentation says of it, and that both are the same."""

import os
import re
from pathlib import Path

import pytest
import vllm.envs

from vllm_w4a4_plugin import envs

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/reference/environment.md"
OURS = r"\bVLLM_W4A4_[A-Z0-9_]*[A-Z0-9]"

SWITCHES = {
    # name -> value if unset, empty, "0", "1"
    "VLLM_W4A4_DISABLE": (False, False, False, True),
    "VLLM_W4A4_FORCE": (False, False, False, True),
    "VLLM_W4A4_LOCAL_SCALES": (False, False, False, True),
    "VLLM_W4A4_NPU_FUSED": (True, True, False, True),
    "VLLM_W4A4_SELF_CHECK": (True, True, False, True),
}
CHOICES = {
    # name -> texts to set, None for unset, and the values to read
    "VLLM_W4A4_ACTIVATION_BITS": ((None, "", "4", "8"), (4, 4, 4, 8)),
    "VLLM_W4A4_HEAD": ((None, "", "int8", "int4", "float"), ("int8", "int8", "int8", "int4", "float")),
}
TEXTS = {"VLLM_W4A4_ISA": "avx2", "ASCEND_HOME_PATH": "/opt/cann"}


def documented() -> dict[str, tuple[str, str]]:
    """Name -> (default, description) in the page's first table."""
    table = re.search(r"\| variable \| default \| effect \|\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE.read_text())
    assert table is not None
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table[1].splitlines()]
    return {name.strip("`"): (default, description) for name, default, description in rows}


def test_the_page_and_the_code_say_the_same() -> None:
    assert documented() == {name: (v.default, v.description) for name, v in envs.VARIABLES.items()}


@pytest.mark.parametrize("name", envs.VARIABLES)
def test_variables_read_as_documented(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    given: tuple[str | None, ...]
    if name in CHOICES:
        given, expected = CHOICES[name]
    else:
        given = (None, "", "0", "1") if name in SWITCHES else (None, "", TEXTS[name])
        expected = SWITCHES.get(name) or (None, None, TEXTS[name])
    for text, value in zip(given, expected, strict=True):
        monkeypatch.delenv(name, raising=False)
        if text is not None:
            monkeypatch.setenv(name, text)
        assert getattr(envs, name) == value
    if name in SWITCHES:
        assert envs.VARIABLES[name].default == str(int(SWITCHES[name][0]))


@pytest.mark.parametrize("text", ["0", "6", "16", "8bit"])
def test_other_numbers_of_activation_bits_are_errors(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_W4A4_ACTIVATION_BITS", text)
    with pytest.raises(ValueError, match=f"VLLM_W4A4_ACTIVATION_BITS: expected 4 or 8, found '{text}'"):
        _ = envs.VLLM_W4A4_ACTIVATION_BITS


def test_older_cann(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", "/opt/old")
    assert envs.ASCEND_HOME_PATH == "/opt/old"
    monkeypatch.setenv("ASCEND_HOME_PATH", "/opt/new")
    assert envs.ASCEND_HOME_PATH == "/opt/new"


def test_unknown_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="VLLM_W4A4_NOTHING"):
        _ = envs.VLLM_W4A4_NOTHING


def test_a_default_does_not_replace_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    envs.set_default("VLLM_CPU_KVCACHE_SPACE", "1")
    assert vllm.envs.VLLM_CPU_KVCACHE_SPACE == 7
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    envs.set_default("VLLM_CPU_KVCACHE_SPACE", "1")
    assert vllm.envs.VLLM_CPU_KVCACHE_SPACE == 1


@pytest.mark.parametrize("file", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda f: f.name)
def test_variables_in_the_documentation_exist(file: Path) -> None:
    text = file.read_text()
    assert set(re.findall(OURS, text)) <= envs.VARIABLES.keys()
    others = {name for name in re.findall(r"\bVLLM_[A-Z0-9_]*[A-Z0-9]", text) if not re.match(OURS, name)}
    assert others <= set(vllm.envs.environment_variables) | {"VLLM_ASCEND_IMAGE"}  # that one is a build argument


def test_the_package_names_no_other_variable() -> None:
    files = (ROOT / "vllm_w4a4_plugin").rglob("*.py")
    assert {name for file in files for name in re.findall(OURS, file.read_text())} <= envs.VARIABLES.keys()


def test_native_code_reads_no_other_variable() -> None:
    files = [file for ending in ("*.cpp", "*.h", "*.hpp") for file in (ROOT / "csrc").rglob(ending)]
    reads = {name for file in files for name in re.findall(r"getenv\(\s*([^)]*?)\s*\)", file.read_text())}
    assert reads == {'"VLLM_W4A4_ISA"'}
    named = {name for file in files for name in re.findall(rf'"({OURS})', file.read_text())}
    assert named <= envs.VARIABLES.keys()


def test_instruction_sets_in_the_description_are_those_of_the_library() -> None:
    source = (ROOT / "csrc/cpu/dispatch.cpp").read_text()
    known = re.findall(r'static const Kernels \w+\{"(\w+)"', source)
    listed = re.findall(r"`(\w+)`", envs.VARIABLES["VLLM_W4A4_ISA"].description)
    assert sorted(listed) == sorted(known)


def test_variables_of_others_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET", "before")
    monkeypatch.delenv("UNSET", raising=False)
    with envs.assigned({"SET": None, "UNSET": "now"}):
        assert "SET" not in os.environ
        assert os.environ["UNSET"] == "now"
    assert os.environ["SET"] == "before"
    assert "UNSET" not in os.environ
