# SPDX-License-Identifier: Apache-2.0
"""Who gets the name "ascend": in every order of registration, in every process, and when we are not wanted."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import entry_points
from typing import Any

import pytest

from tests.npu import processes
from tests.npu.processes import OURS, THEIRS

LEFT_OUT = ",".join(
    entry.name
    for group in ("vllm.general_plugins", "vllm.platform_plugins")
    for entry in entry_points(group=group)
    if entry.name != "w4a4"
)
"""VLLM_PLUGINS without us."""


@pytest.fixture
def run(fresh_process: ProcessPoolExecutor) -> Callable[..., Any]:
    def submit(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return fresh_process.submit(function, *args, **kwargs).result(timeout=120)

    return submit


@pytest.mark.parametrize(
    "steps",
    [
        ("plugin", "platform"),
        ("platform", "plugin"),
        ("plugin", "parser", "platform", "plugin"),
        ("parser", "all plugins", "platform"),
        ("all plugins",),
    ],
    ids=", ".join,
)
def test_we_win_the_name(run: Callable[..., Any], steps: tuple[str, ...]) -> None:
    found = run(processes.in_order, *steps)
    assert found["class"] == OURS
    assert found["patched first"], "vllm-ascend's modules must be imported after its own patches"
    # Children of a process log nothing: only the process that the user started says it.
    assert found["log"] == []


def test_the_users_process_says_so_once(run: Callable[..., Any]) -> None:
    found = run(processes.of_the_user, "plugin", "parser", "all plugins", "plugin")
    (said,) = found["log"]
    assert "has taken over the quantization method 'ascend' from vllm-ascend 0.23.0" in said
    assert found["choices"] == ["fp8", "ascend"]


@pytest.mark.parametrize("environment", [{"VLLM_W4A4_DISABLE": "1"}, {"VLLM_PLUGINS": LEFT_OUT}], ids=str)
def test_without_us_vllm_ascend_is_alone(run: Callable[..., Any], environment: dict[str, str]) -> None:
    found = run(processes.in_order, "all plugins", "platform", **environment)
    assert found["class"] == THEIRS
    assert found["our modules"] == []


@pytest.mark.parametrize("version", ["0.22.1", "0.24.0rc1", "1.0"])
def test_another_version_makes_us_step_aside(run: Callable[..., Any], version: str) -> None:
    found = run(processes.pretending, version)
    assert found["class"] == THEIRS
    (said,) = found["log"]
    assert f"tested with vllm-ascend 0.23 to 0.23, this is vllm-ascend {version}" in said
    assert "VLLM_W4A4_FORCE=1" in said


def test_unless_forced(run: Callable[..., Any]) -> None:
    assert run(processes.pretending, "0.24.0", force="1")["class"] == OURS


def test_workers_get_our_configuration(run: Callable[..., Any]) -> None:
    """Engine and worker processes unpickle it, before or after they load plugins."""
    data = run(processes.pickled_configuration)
    assert run(processes.unpickled, data) == (OURS, "W4A4_FLATQUANT_DYNAMIC", 79)


def test_disabled_is_as_absent_to_the_bit(run: Callable[..., Any]) -> None:
    """Layers, parameters and outputs with the plugin switched off, and in a process that cannot even import it."""
    code = """
import importlib.metadata, json, sys
known = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **kw: [e for e in known(**kw) if e.name != "w4a4"] if kw else known()
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vllm_w4a4_plugin":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from tests.npu import processes
print(json.dumps(processes.fingerprint()))
"""
    absent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert absent.returncode == 0, absent.stderr
    expected = json.loads(absent.stdout.splitlines()[-1])
    assert any("AscendW4A4FlatQuantDynamicLinearMethod" in value for value in expected.values())
    assert run(processes.fingerprint, VLLM_W4A4_DISABLE="1") == expected
    assert run(processes.fingerprint, VLLM_PLUGINS=LEFT_OUT) == expected
    # With us the W8A8 and float layers are still theirs, to the bit.
    with_us = run(processes.fingerprint)
    ours = {name for name in expected if name.endswith(("qkv_proj", "gate_up_proj"))}
    assert all(with_us[name].startswith("AscendW4A4NpuLinearMethod W4A4NpuScheme") for name in ours)
    assert {name: with_us[name] for name in with_us.keys() - ours} == {n: expected[n] for n in expected.keys() - ours}
