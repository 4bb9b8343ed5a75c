# SPDX-License-Identifier: Apache-2.0
"""The mutation generator changes what it is for, on one line each."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

GENERATE = Path(__file__).resolve().parents[2] / "csrc/npu/tests/mutation/generate.py"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks for its module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return load(GENERATE)


MUTATED = [
    ("AscendC::SetFlag<HardEvent::V_S>(i);", "(mutation::is(1) ? void() : AscendC::SetFlag<HardEvent::V_S>(i));"),
    ("if (a > (b)) {", "if (mutation::is(1) ? true : (a > (b))) {"),
    ("if (a == 0) return;", "if (mutation::is(1) ? false : (a == 0)) return;"),
    ("x = Min(f(a, b), c);", "x = (mutation::is(1) ? (f(a, b)) : Min(f(a, b), c));"),
    ("y(tiling_.scale_factor);", "y((mutation::is(1) ? tiling_.inverse_factor : tiling_.scale_factor));"),
    ("if constexpr (a) {", "if constexpr (a) {"),
    ("// if (a) AscendC::PipeBarrier<PIPE_V>();", "// if (a) AscendC::PipeBarrier<PIPE_V>();"),
]


@pytest.mark.parametrize(("text", "mutated"), MUTATED)
def test_mutation(generate: ModuleType, text: str, mutated: str) -> None:
    mutants: list[object] = []
    assert generate.mutate(text + "\n", "a.h", mutants) == mutated + "\n"
    assert len(mutants) == (text != mutated)


def test_nested_mutations(generate: ModuleType) -> None:
    mutants: list[object] = []
    text = generate.mutate("if (w) AscendC::PipeBarrier<PIPE_M>();\nx = Min(Min(a, b), c);\n", "a.h", mutants)
    assert len(mutants) == 4
    assert text.count("(") == text.count(")")
    assert "if (mutation::is(2) ? true : (w)) (mutation::is(1) ? void() : AscendC::PipeBarrier<PIPE_M>());" in text


def test_flags_between_cores(generate: ModuleType) -> None:
    mutants: list[object] = []
    text = generate.mutate("AscendC::CrossCoreWaitFlag(kGrid);\n", "a.h", mutants)
    assert [mutant.kind for mutant in mutants] == ["CrossCoreWaitFlag", "wrong id", "wrong id"]
    other = "(mutation::is(2) ? kTokensReady : mutation::is(3) ? kSumsReady : kGrid)"
    assert text == f"(mutation::is(1) ? void() : AscendC::CrossCoreWaitFlag({other}));\n"
    with pytest.raises(ValueError, match="add the flag kNew to COUNTED_BY"):
        generate.mutate("AscendC::CrossCoreWaitFlag(kNew);\n", "a.h", [])


def test_shared_ids(generate: ModuleType) -> None:
    mutants: list[object] = []
    ids = ["kTokensFree = 1", "kActivationsReady = 3", "kSumsFree = 5"]
    text = generate.mutate("".join(f"inline constexpr uint16_t {one};\n" for one in ids), "a.h", mutants)
    assert [mutant.kind for mutant in mutants] == ["shared id"] * 3
    assert text.splitlines()[0].startswith("inline const mutation::Flag kTokensFree(1, {{1, 3}, {2, 5}});")
    assert text.splitlines()[1].startswith("inline const mutation::Flag kActivationsReady(3, {{3, 5}});")
