# SPDX-License-Identifier: Apache-2.0
"""Who gets the name "ascend": in every order of registration, in every process, and when we are not wanted."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import entry_points, version
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


ORDERS = [("plugin", "platform"), ("platform", "plugin"), ("parser", "all plugins", "platform"), ("all plugins",)]
SWITCHED_OFF = [{"VLLM_W4A4_DISABLE": "1"}, {"VLLM_PLUGINS": LEFT_OUT}]
STARTED_AT_ONCE = [
    (processes.fingerprint, (), {}),
    (processes.fingerprint, (), SWITCHED_OFF[0]),
    *((processes.in_order, steps, {}) for steps in ORDERS),
    *((processes.in_order, ("all plugins", "platform"), environment) for environment in SWITCHED_OFF),
]


def _key(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return function.__name__, args, tuple(sorted(kwargs.items()))


@pytest.fixture(scope="module")
def run(fresh_process: ProcessPoolExecutor) -> Callable[..., Any]:
    """Calls a function in a fresh process; most calls run ahead, two at a time."""
    started = {_key(*call): fresh_process.submit(call[0], *call[1], **call[2]) for call in STARTED_AT_ONCE}

    def result(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        future = started.get(_key(function, args, kwargs)) or fresh_process.submit(function, *args, **kwargs)
        return future.result(timeout=300)

    return result


@pytest.mark.parametrize("steps", ORDERS, ids=", ".join)
def test_we_win_the_name(run: Callable[..., Any], steps: tuple[str, ...]) -> None:
    found = run(processes.in_order, *steps)
    assert found["class"] == OURS
    assert found["patched first"], "vllm-ascend's modules must be imported after its own patches"
    # Children of a process log nothing: only the process that the user started says it.
    assert found["log"] == []


def test_the_users_process_says_so_once(run: Callable[..., Any]) -> None:
    found = run(processes.of_the_user, "plugin", "parser", "all plugins", "plugin")
    (said,) = found["log"]
    assert f"extends the quantization method 'ascend' of vllm-ascend {version('vllm-ascend')}" in said
    assert found["choices"] == ["fp8", "ascend"]


@pytest.mark.parametrize("environment", SWITCHED_OFF, ids=["disabled", "left out"])
def test_without_us_vllm_ascend_is_alone(run: Callable[..., Any], environment: dict[str, str]) -> None:
    found = run(processes.in_order, "all plugins", "platform", **environment)
    assert found["class"] == THEIRS
    assert found["our modules"] == []


def test_another_version_makes_us_step_aside(run: Callable[..., Any]) -> None:
    found = run(processes.pretending, "0.31.0rc1")
    assert found["class"] == THEIRS
    (said,) = found["log"]
    assert "it supports vllm-ascend 0.20 to 0.30, this is vllm-ascend 0.31.0rc1" in said
    assert "VLLM_W4A4_FORCE=1" in said


def test_unless_forced(run: Callable[..., Any]) -> None:
    assert run(processes.pretending, "0.31.0", force="1")["class"] == OURS


@pytest.mark.parametrize(("generation", "theirs"), [("A5", THEIRS), ("_310P", "AscendModelSlimConfig310")])
def test_devices_without_int4_make_us_step_aside(run: Callable[..., Any], generation: str, theirs: str) -> None:
    found = run(processes.on_device, generation)
    assert found["class"] == theirs
    (said,) = found["log"]
    assert f"built for {generation} devices, which have no int4 matrix product" in said


def test_left_out_vllm_ascend_is_not_asked(run: Callable[..., Any]) -> None:
    assert run(processes.on_a_cpu) == {"class": "AscendW4A4Config", "theirs": False}


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
    # With us the W8A8 and float layers are still theirs, to the bit.
    with_us = run(processes.fingerprint)
    ours = {name for name in expected if name.endswith(("qkv_proj", "gate_up_proj"))}
    assert all(with_us[name].startswith("AscendW4A4NpuLinearMethod W4A4NpuScheme") for name in ours)
    assert {name: with_us[name] for name in with_us.keys() - ours} == {n: expected[n] for n in expected.keys() - ours}
