# SPDX-License-Identifier: Apache-2.0
"""docs/npu.md: its table of log lines and of exit codes say what the code says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from vllm_w4a4_plugin.cli.device_check import EXIT_CODES
from vllm_w4a4_plugin.device_check import report

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/npu.md").read_text()
PACKAGE = ROOT / "vllm_w4a4_plugin"
ON_NPUS = (
    "platforms/registration.py",
    "platforms/vllm_ascend.py",
    "ops/npu/*.py",
    "quantization/ascend_*.py",
    "quantization/linear.py",
    "quantization/report.py",
    "quantization/source.py",
    "quantization/schemes/base.py",
    "quantization/schemes/w4a4_npu.py",
    "quantization/schemes/experts_npu.py",
    "quantization/parameters/*.py",
)
"""Files that run on NPUs and may log. The model loader and the rest of `quantization` are for CPUs."""
LOGS = {"debug", "info", "info_once", "warning", "warning_once", "error", "exception"}
VARIES = "…"


def rows(title: str) -> dict[str, str]:
    """First column -> second, of the table with this header."""
    table = re.search(rf"\| {re.escape(title)} \|\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE)
    assert table is not None
    lines = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table[1].splitlines()]
    return {first.strip("`"): second for first, second in lines}


def template(node: ast.expr) -> str:
    """The text of a message, what varies replaced."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else VARIES for part in node.values)
    assert isinstance(node, ast.Constant), ast.unparse(node)
    return " ".join(re.sub(r"%[sd]", VARIES, node.value).split())


def logged(file: Path) -> Iterator[str]:
    """Templates of the messages in one file, without the function that passes on what it is given."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id == "_say":
            yield template(node.args[1])
        elif isinstance(function, ast.Attribute) and ast.unparse(function).removeprefix("logger.") in LOGS:
            yield template(node.args[0])


def test_the_table_of_log_lines_is_complete_and_true() -> None:
    files = [file for pattern in ON_NPUS for file in PACKAGE.glob(pattern)]
    assert len(files) > len(ON_NPUS)
    assert set(rows("line | what it means")) == {line for file in files for line in logged(file)}


def test_exit_codes() -> None:
    documented = {int(code): text for code, text in rows("exit code | meaning").items()}
    helped = {int(code): text for code, text in re.findall(r"^  (\d)  (.*)$", EXIT_CODES, re.MULTILINE)}
    assert {code: text.replace("`", "") for code, text in documented.items()} == helped
    assert documented.keys() == report.VERDICTS.keys() | {2}
    names = (report.PASSED, report.FAILED, report.FUSED_FAILED, report.NO_NPU)
    assert [documented[code].split()[0] for code in names] == ["everything", "CANN's", "only", "no"]


def test_it_says_what_was_not_run() -> None:
    assert "**Nothing here has run on an NPU.**" in PAGE
    assert "attach its JSON file" in PAGE
