# SPDX-License-Identifier: Apache-2.0
"""What the tests do in processes of their own; each function returns plain values."""

import hashlib
import logging
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MICRO = Path(__file__).parents[1] / "data" / "micro-qwen3-w4a4"
CONFIG_MODULE = "modelslim_config"
"""Last part of the name of the module with vllm-ascend's configuration."""
OURS, THEIRS = "AscendW4A4ModelSlimConfig", "AscendModelSlimConfig"


def method_class() -> str:
    """Name of the class that vLLM would use for `--quantization ascend`."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    return get_quantization_config("ascend").__name__


def in_order(*steps: str, **environment: str) -> dict[str, Any]:
    """Do the steps `plugin`, `platform`, `parser`, `all plugins` in the given order; what came of it."""
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    import vllm_w4a4_plugin

    os.environ |= environment
    log = _Log()
    parser = FlexibleArgumentParser()
    parser.add_argument("--quantization", choices=["fp8"])
    actions: dict[str, Callable[[], Any]] = {
        "plugin": vllm_w4a4_plugin.register,
        "platform": current_platform.pre_register_and_update,
        "parser": lambda: current_platform.pre_register_and_update(parser),
        "all plugins": load_general_plugins,
    }
    for step in steps:
        actions[step]()
    modules = list(sys.modules)
    configuration = next(name for name in modules if name.startswith("vllm_ascend") and name.endswith(CONFIG_MODULE))
    return {
        "class": method_class(),
        "log": log.lines,
        "patched first": modules.index("vllm_ascend.patch.platform") < modules.index(configuration),
        "our modules": [name for name in modules if name.startswith("vllm_w4a4_plugin.quantization")],
        "choices": parser._option_string_actions["--quantization"].choices,
    }


def of_the_user(*steps: str, **environment: str) -> dict[str, Any]:
    """`in_order` in what looks like the process that the user started, not one of its children."""
    multiprocessing.parent_process = lambda: None
    return in_order(*steps, **environment)


def pretending(version: str, force: str = "0") -> dict[str, Any]:
    """Register with another version of vllm-ascend."""
    from vllm_w4a4_plugin.platforms import vllm_ascend

    vllm_ascend._version = lambda: version
    return of_the_user("platform", "plugin", VLLM_W4A4_FORCE=force)


def on_a_cpu() -> dict[str, Any]:
    """Register where vllm-ascend is installed but vLLM chose its CPU platform (VLLM_PLUGINS=w4a4)."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    import vllm_w4a4_plugin

    vllm.platforms._current_platform = CpuPlatform()
    vllm_w4a4_plugin.register()
    return {"class": method_class(), "theirs": any(name.endswith(CONFIG_MODULE) for name in sys.modules)}


def on_device(generation: str) -> dict[str, Any]:
    """Register with a vllm-ascend that was built for other devices."""
    from vllm_ascend import _build_info, utils

    _build_info.__device_type__ = generation
    if hasattr(utils, "_ascend_device_type"):  # vllm-ascend 0.23 keeps what it has read there
        utils._ascend_device_type = None
    else:
        from vllm_ascend.device import device_config, hardware_profile

        device_config.get_device_config.cache_clear()
        profile = hardware_profile.get_hardware_profile(device_config.get_ascend_device_type())
        hardware_profile._CURRENT_HARDWARE_PROFILE = profile
    return of_the_user("plugin", "platform")


def pickled_configuration() -> bytes:
    """The quantization configuration of the micro checkpoint, as vLLM sends it to its worker processes."""
    from tests.npu.loading import engine_config

    return pickle.dumps(engine_config(MICRO).quant_config)


def unpickled(data: bytes) -> tuple[str, str, int]:
    """A worker process that gets a configuration before it has loaded any plugin: (class, description, tensors)."""
    config = pickle.loads(data)
    return type(config).__name__, config.quant_description["model_quant_type"], len(config.inventory.tensors)


def fingerprint(**environment: str) -> dict[str, str]:
    """Of each linear layer of the micro checkpoint as loaded: its classes, and a digest of parameters and output."""
    os.environ |= environment
    from tests.npu.loading import loaded_model, run_operators_on_cpu

    found = {}
    with loaded_model(MICRO) as model:
        if "vllm_w4a4_plugin.ops.npu" in sys.modules:
            run_operators_on_cpu()
        for name, layer in model.named_modules():
            method = getattr(layer, "quant_method", None)
            if not name.startswith("model.layers.") or method is None:
                continue
            digest = hashlib.sha256()
            for key, parameter in sorted(layer.named_parameters(recurse=False)):
                digest.update(key.encode() + parameter.data.contiguous().view(torch.uint8).numpy().tobytes())
            scheme = getattr(method, "quant_method", None)
            if scheme is not None:
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(5, layer.input_size, generator=generator).to(torch.bfloat16)
                digest.update(method.apply(layer, x, None).view(torch.uint8).numpy().tobytes())
            found[name] = f"{type(method).__name__} {type(scheme).__name__} {digest.hexdigest()}"
    return found


class _Log(logging.Handler):
    """Collects what the plugin logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logger = logging.getLogger("vllm.plugins.w4a4")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
