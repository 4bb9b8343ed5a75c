# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from vllm_w4a4_plugin.capacity.versions import NOT_FOUND, found_versions
from vllm_w4a4_plugin.constants import VERSION


@pytest.fixture(autouse=True)
def no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_a_machine_without_an_npu(tmp_path: Path) -> None:
    found = found_versions(tmp_path)
    assert found["vllm-w4a4-plugin"] == VERSION
    assert {found[name] for name in ("CANN", "driver", "torch-npu")} == {NOT_FOUND}


def test_cann_and_driver(tmp_path: Path) -> None:
    home = tmp_path / "usr/local/Ascend"
    toolkit = home / "ascend-toolkit/latest/aarch64-linux"
    toolkit.mkdir(parents=True)
    (toolkit / "ascend_toolkit_install.info").write_text(
        "package_name=Ascend-cann-toolkit\nversion=8.5.0\narch=aarch64\n"
    )
    (home / "driver").mkdir()
    (home / "driver/version.info").write_text("Version=25.2.0\nascendhal_version=7.35.23\n")
    found = found_versions(tmp_path)
    assert (found["CANN"], found["driver"]) == ("8.5.0", "25.2.0")


def test_the_environment_names_the_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version.cfg").write_text("# comment\nruntime_running_version=[7.8.0.1:8.3.RC1]\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert found_versions(Path("/none"))["CANN"] == "8.3.RC1"
