#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The tools find what they are for: on sources with one fault each."""

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECK_SOURCES = ROOT / "tools/check_sources.py"
TYPE_CHECK = ROOT / "tools/type_check.py"

CLEAN = '#include "kernel_operator.h"\n__aicore__ inline void f() { AscendC::SyncAll<true>(); }\n'
FAULTS = [
    ("#include <vector>\n", "a.h:3: a device source must not include vector"),
    ("#include <cstdint>\n", "a.h:3: a device source must not include cstdint"),
    ("__aicore__ inline int g() { return std::min(1, 2); }\n", "a.h:3: 'std::' is not for device code"),
    ("__aicore__ inline void g() { throw 1; }\n", "a.h:3: 'throw' is not for device code"),
    ("__aicore__ inline int* g() { return new int; }\n", "a.h:3: 'new' is not for device code"),
    ("__aicore__ inline void g() { AscendC::Exp(1); }\n", "a.h:3: AscendC::Exp is not in the list"),
    ("inline void g() {}\n", "a.h:3: g is not __aicore__"),
    (
        "__global__ __aicore__ void k() { f(); }\n",
        "a.h:3: its cores wait for each other, so it needs",
    ),
    ("__aicore__ inline void g() { g(); }\n", "recursion: g -> g"),
    ("__aicore__ inline void g() { h(); }\n__aicore__ inline void h() { g(); }\n", "recursion: g -> h -> g"),
]

KERNEL = """#include "kernel_operator.h"
__global__ __aicore__ void k(GM_ADDR x) {
  if ASCEND_IS_AIV {
    AscendC::TPipe pipe;
    AscendC::TBuf<AscendC::TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, 64);
    AscendC::Duplicate(buffer.Get<float>(), 1.0f, 16);
  }
}
"""
LAUNCH = "void launch(void* stream, GM_ADDR x) { k<<<8, nullptr, stream>>>(x); }\n"


class CheckSources(unittest.TestCase):
    def setUp(self) -> None:
        spec = importlib.util.spec_from_file_location("check_sources", CHECK_SOURCES)
        assert spec is not None
        assert spec.loader is not None
        self.tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.tool)
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)

    def check(self, text: str, file: str = "a.h", shared: frozenset[str] = frozenset()) -> list[str]:
        (self.directory / file).write_text(text)
        return self.tool.check(self.directory, shared)

    def test_one_fault(self) -> None:
        for text, finding in FAULTS:
            with self.subTest(text):
                findings = self.check(CLEAN + text)
                assert len(findings) == 1
                assert findings[0].startswith(finding)

    def test_clean_source(self) -> None:
        assert self.check(CLEAN + "// std::vector in a comment, throw, new\n") == []

    def test_scheduling_mode(self) -> None:
        assert self.check(CLEAN + "__schedmode__(1) __global__ __aicore__ void k() { f(); }\n") == []
        alone = '#include "kernel_operator.h"\n__global__ __aicore__ void k() {}\n'
        assert self.check(alone) == []

    def test_nothing_to_check(self) -> None:
        assert self.tool.check(self.directory, frozenset()) == [f"no function found in {self.directory}"]

    def test_file_shared_with_the_host(self) -> None:
        assert self.check("#include <cstdint>\n" + CLEAN, shared=frozenset({"a.h"})) == []

    def test_documented_names_exist(self) -> None:
        headers = "".join(path.read_text() for path in (ROOT / "include").rglob("*.h"))
        declared = set(re.findall(r"\w+", headers))
        assert self.tool.DOCUMENTED - declared == set()


class TypeCheck(unittest.TestCase):
    compiler = "g++"

    def type_check(self, core: str, text: str, *options: str) -> subprocess.CompletedProcess[str]:
        with tempfile.NamedTemporaryFile("w", suffix=".cpp") as source:
            source.write(text)
            source.flush()
            command = [sys.executable, str(TYPE_CHECK), "--compiler", self.compiler, "--core", core, *options]
            return subprocess.run([*command, source.name], capture_output=True, text=True)

    def test_kernel_and_launch(self) -> None:
        for core in ("AIC", "AIV"):
            assert self.type_check(core, KERNEL + LAUNCH, "--expect-launch").returncode == 0

    def test_missing_launch(self) -> None:
        assert self.type_check("AIV", KERNEL).returncode == 0
        result = self.type_check("AIV", KERNEL, "--expect-launch")
        assert result.returncode == 1
        assert "no launch found" in result.stdout

    def test_instruction_of_the_other_core(self) -> None:
        result = self.type_check("AIC", KERNEL.replace("if ASCEND_IS_AIV", ""))
        assert result.returncode == 1
        assert "a vector instruction in the AIC's pass" in result.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiler", default=TypeCheck.compiler)
    TypeCheck.compiler = parser.parse_args().compiler
    unittest.main(argv=sys.argv[:1])
