# SPDX-License-Identifier: Apache-2.0
"""When our platform steps in, with the platforms of vLLM and of other plugins replaced by answers."""

from collections.abc import Callable

import pytest

import vllm_w4a4_plugin
from vllm_w4a4_plugin.platforms import detection

CPU = "vllm.platforms.cpu.CpuPlatform"
OURS = "vllm_w4a4_plugin.platforms.cpu.W4A4CpuPlatform"


def answer(value: str | None) -> Callable[[], str | None]:
    return lambda: value


@pytest.fixture
def platforms(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def replace(builtin: dict[str, Callable[[], str | None]], plugins: dict[str, Callable[[], str | None]]) -> None:
        import vllm.platforms
        import vllm.plugins

        monkeypatch.setattr(vllm.platforms, "builtin_platform_plugins", builtin)
        monkeypatch.setattr(vllm.plugins, "load_plugins_by_group", lambda group: plugins)

    return replace


def test_plain_cpu_is_ours(platforms: Callable[..., None]) -> None:
    platforms({"cuda": answer(None), "cpu": answer(CPU)}, {"w4a4": vllm_w4a4_plugin.platform_plugin})
    assert vllm_w4a4_plugin.platform_plugin() == OURS


def test_zen_cpu_stays_vllms(platforms: Callable[..., None]) -> None:
    platforms({"cpu": answer("vllm.platforms.zen_cpu.ZenCpuPlatform")}, {})
    assert vllm_w4a4_plugin.platform_plugin() is None


def test_cuda_stays_vllms(platforms: Callable[..., None]) -> None:
    platforms({"cuda": answer("vllm.platforms.cuda.CudaPlatform"), "cpu": answer(None)}, {})
    assert vllm_w4a4_plugin.platform_plugin() is None


def test_another_active_plugin_stays_in_charge(platforms: Callable[..., None]) -> None:
    platforms({"cpu": answer(CPU)}, {"ascend": answer("vllm_ascend.platform.NPUPlatform")})
    assert vllm_w4a4_plugin.platform_plugin() is None


def test_an_inactive_or_failing_plugin_does_not_matter(platforms: Callable[..., None]) -> None:
    def failing() -> str:
        raise OSError("no driver")

    platforms({"cpu": answer(CPU)}, {"tpu": answer(None), "broken": failing})
    assert vllm_w4a4_plugin.platform_plugin() == OURS


def test_plugins_that_ask_each_other_come_to_an_end(platforms: Callable[..., None]) -> None:
    asked = []

    def asks_us() -> str | None:
        asked.append(detection.would_choose_cpu_platform())
        return None

    platforms({"cpu": answer(CPU)}, {"other": asks_us})
    assert vllm_w4a4_plugin.platform_plugin() == OURS
    assert asked == [False]
