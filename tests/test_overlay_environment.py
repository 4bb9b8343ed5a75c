# SPDX-License-Identifier: Apache-2.0
"""An environment that adds the packages of another one to its path, as overlays for experiments do."""

import site
import subprocess
import venv
from pathlib import Path


def test_kernels_of_the_environment_underneath_are_found(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    venv.create(overlay, with_pip=False)
    (folder,) = overlay.glob("lib/python*/site-packages")
    below = [directory for directory in site.getsitepackages() if Path(directory).is_dir()]
    (folder / "below.pth").write_text("".join(f"import site; site.addsitedir({entry!r})\n" for entry in below))
    code = "from vllm_w4a4_plugin import ops; print(ops.cpu_instruction_set())"
    found = subprocess.run([str(overlay / "bin/python"), "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    from vllm_w4a4_plugin import ops

    assert found.stdout.strip() == ops.cpu_instruction_set()
