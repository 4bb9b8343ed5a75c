# SPDX-License-Identifier: Apache-2.0
"""No file of a checkpoint is run: neither its Python code, without vLLM's flag, nor a pickle."""

import ast
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.calibration.conftest import _one_thread, float_model  # noqa: F401 - fixtures
from tests.conftest import MICRO, WEIGHTS
from vllm_w4a4_plugin.cli import main

PACKAGE = Path(__file__).parents[2] / "vllm_w4a4_plugin"


def plant_code(directory: Path) -> Path:
    """Python code that config.json names, as models of one's own have it; the file that it would write."""
    marker = directory.parent / "was-run"
    (directory / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((directory / "config.json").read_text())
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.T", None]}
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": names}))
    return marker


class Exploit:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("command", ["verify", "inspect", "doctor"])
def test_checks_run_no_code(micro_copy: Path, command: str) -> None:
    marker = plant_code(micro_copy)
    (micro_copy / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(marker)))
    main([command, str(micro_copy)])
    assert not marker.exists()


def test_quantize_runs_code_only_if_told_to(
    float_model: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = float_model("qwen3")
    marker = plant_code(directory)
    command = ["quantize", str(directory), "--output", str(tmp_path / "out"), "--calib-tokens", "1024"]
    assert main(command) == 1
    assert "trust_remote_code" in capsys.readouterr().err
    assert not marker.exists()
    with pytest.raises(AttributeError, match="Config"):  # the code defines nothing; but it was run
        main([*command, "--trust-remote-code"])
    assert marker.exists()


@pytest.mark.parametrize("kept", [True, False], ids=["beside safetensors", "alone"])
def test_pickled_weights_are_not_read(micro_copy: Path, capsys: pytest.CaptureFixture[str], kept: bool) -> None:
    marker = micro_copy.parent / "was-run"
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        (micro_copy / name).write_bytes(pickle.dumps(Exploit(marker)))
    if not kept:
        for file in [*micro_copy.glob("*.safetensors"), *micro_copy.glob("*.index.json")]:
            file.unlink()
    assert main(["verify", str(micro_copy)]) == (0 if kept else 1)
    assert kept or "holds no *.safetensors file" in capsys.readouterr().out
    assert not marker.exists()


def test_a_pickle_under_the_name_of_a_shard(micro_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = micro_copy.parent / "was-run"
    (micro_copy / WEIGHTS).write_bytes(pickle.dumps(Exploit(marker)))
    assert main(["verify", str(micro_copy)]) == 1
    assert "not a whole safetensors file" in capsys.readouterr().out
    assert not marker.exists()


def calls() -> list[tuple[str, ast.Call]]:
    return [
        (f"{file.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node.func)}", node)
        for file in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_the_package_has_no_call_that_could_run_a_file() -> None:
    forbidden = {"eval", "exec", "compile", "__import__", "os.system", "yaml.load", "yaml.unsafe_load", "marshal.loads"}
    found = [place for place, call in calls() if ast.unparse(call.func) in forbidden]
    modules = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
    imported = [
        f"{file.name}: {name}"
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name.partition(".")[0] in modules
    ]
    assert found + imported == []


def test_what_torch_and_transformers_load_is_confined() -> None:
    for place, call in calls():
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        name = ast.unparse(call.func)
        if name == "torch.load":
            assert options.get("weights_only") == "True", place
        if name.endswith(".from_pretrained"):
            assert options.get("trust_remote_code") == "trust_remote_code", place
            if not name.startswith("Auto"):  # a model, not its configuration or tokenizer
                assert options.get("use_safetensors") == "True", place


def test_the_planted_code_would_be_noticed(micro_copy: Path) -> None:
    """The pickles above do what they are meant to, where somebody loads them."""
    marker = micro_copy.parent / "was-run"
    pickle.loads(pickle.dumps(Exploit(marker))).close()
    assert marker.exists()
    assert MICRO.is_dir()
