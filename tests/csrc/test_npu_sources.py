# SPDX-License-Identifier: Apache-2.0
"""The tools that judge the NPU kernels' sources find what they are for: on sources with one fault each."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).resolve().parents[2] / "csrc/npu/tests"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks for its module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sources() -> ModuleType:
    return load(TESTS / "sources/check_sources.py")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return load(TESTS / "mutation/generate.py")


CLEAN = '#include "kernel_operator.h"\n__aicore__ inline void f() { AscendC::SyncAll<true>(); }\n'


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("#include <vector>\n", "a.h:3: a device source must not include vector"),
        ("#include <cstdint>\n", "a.h:3: a device source must not include cstdint"),
        ("__aicore__ inline int g() { return std::min(1, 2); }\n", "a.h:3: 'std::' is not for device code"),
        ("__aicore__ inline void g() { throw 1; }\n", "a.h:3: 'throw' is not for device code"),
        ("__aicore__ inline int* g() { return new int; }\n", "a.h:3: 'new' is not for device code"),
        ("__aicore__ inline void g() { AscendC::Exp(1); }\n", "a.h:3: AscendC::Exp is not in the list"),
        ("inline void g() {}\n", "a.h:3: g is not __aicore__"),
        ("__aicore__ inline void g() { g(); }\n", "recursion: g -> g"),
        ("__aicore__ inline void g() { h(); }\n__aicore__ inline void h() { g(); }\n", "recursion: g -> h -> g"),
    ],
)
def test_one_fault(sources: ModuleType, tmp_path: Path, text: str, finding: str) -> None:
    (tmp_path / "a.h").write_text(CLEAN + text)
    findings = sources.check(tmp_path)
    assert len(findings) == 1
    assert findings[0].startswith(finding)


def test_clean_source(sources: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text(CLEAN + "// std::vector in a comment, throw, new\n")
    assert sources.check(tmp_path) == []


def test_nothing_to_check(sources: ModuleType, tmp_path: Path) -> None:
    assert sources.check(tmp_path) == [f"no function found in {tmp_path}"]


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
