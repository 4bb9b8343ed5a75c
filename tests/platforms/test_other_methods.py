# SPDX-License-Identifier: Apache-2.0
"""Other quantization methods are what they are without this plugin."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MICRO

INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}
CHECKPOINTS = {
    "float": None,
    "compressed-tensors": INT8,
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "gguf": {"quant_method": "gguf"},
    "unknown": {"quant_method": "no-such-method"},
}
LOADED = ("float", "compressed-tensors", "gptq")
"""Those of which a model is made, with weights made up."""

CODE = """
import json, sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.plugins import load_general_plugins

def attempt(action):
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def described(folder):
    config = EngineArgs(model=str(folder), max_model_len=128, enforce_eager=True).create_engine_config()
    method = config.quant_config and [type(config.quant_config).__module__, type(config.quant_config).__name__]
    model = config.model_config
    compilation = config.compilation_config
    modes = [str(compilation.mode), str(compilation.cudagraph_mode), config.kernel_config.ir_op_priority.rms_norm]
    return [method, model.quantization, str(model.dtype), str(config.load_config.load_format), modes]

def layers(folder):
    config = EngineArgs(
        model=str(folder), max_model_len=128, enforce_eager=True, load_format="dummy"
    ).create_engine_config()
    with set_current_vllm_config(config), patch("torch.accelerator.empty_cache"):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        ensure_model_parallel_initialized(1, 1, backend="gloo")
        methods = [type(getattr(m, "quant_method", m)) for m in get_model(vllm_config=config).modules()]
    return Counter(f"{kind.__module__}.{kind.__name__}" for kind in methods)

load_general_plugins()
classes = {
    name: attempt(lambda: f"{get_quantization_config(name).__module__}.{get_quantization_config(name).__name__}")
    for name in QUANTIZATION_METHODS
    if name != "ascend"
}
folders = {folder.name: attempt(lambda: described(folder)) for folder in sorted(Path(sys.argv[1]).iterdir())}
modules = {name: attempt(lambda: layers(Path(sys.argv[1]) / name)) for name in sys.argv[2:]}
print("RESULT" + json.dumps([classes, folders, modules], sort_keys=True))
"""


def answers(folder: Path, **environment: str) -> Any:
    command = [sys.executable, "-c", CODE, str(folder), *LOADED]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.rpartition("RESULT")[2])


@pytest.mark.feature("other quantization methods, unaffected by this plugin")
def test_same_class_or_error_with_and_without_the_plugin(tmp_path: Path) -> None:
    config = json.loads((MICRO / "config.json").read_text())
    del config["quantize"]
    for name, quantization in CHECKPOINTS.items():
        folder = tmp_path / name
        folder.mkdir()
        extra = {"quantization_config": quantization} if quantization else {}
        (folder / "config.json").write_text(json.dumps({**config, **extra}))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((MICRO / file).read_bytes())
    classes, folders, modules = answers(tmp_path)
    # The error about an unknown method lists those that there are. GGUF is known only with a plugin of its own.
    for name in ("unknown", "gguf"):
        folders[name] = folders[name].replace(", 'ascend'", "")
    assert [classes, folders, modules] == answers(tmp_path, VLLM_W4A4_DISABLE="1")
    assert len(classes) > 10
    assert folders["compressed-tensors"][0][1] == "CompressedTensorsConfig"
    assert folders["float"][0] is None
    assert "no-such-method" in folders["unknown"]
    for name, method in (("float", "Unquantized"), ("compressed-tensors", "CompressedTensors")):
        assert any(method in kind and count > 1 for kind, count in modules[name].items()), modules[name]
