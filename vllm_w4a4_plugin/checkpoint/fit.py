# SPDX-License-Identifier: Apache-2.0
"""Whether the stored weights are those of the model that config.json describes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .architectures import ARCHITECTURES, Decoder, ModuleShape, architecture_of
from .model_config import SizeError, layer_number, text_config
from .packed import matrix_shape
from .types import BIAS, FLOAT_DTYPES, WEIGHT, QuantType, known_types

if TYPE_CHECKING:
    from .inventory import Inventory

CONFIG_FILE = "config.json"


def architectures_finding(config: Mapping[str, Any], directory: Path) -> str:
    """What is wrong with the names of the model's class, "" if nothing is. None at all are no fault."""
    names = config.get("architectures") or []
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return ""
    return (
        f"{directory / CONFIG_FILE}: architectures must be a list of names, found {names!r}. Restore the config.json "
        "of the float model."
    )


def config_findings(inventory: "Inventory", directory: Path) -> Iterator[str]:
    """Where names, shapes and biases are not those of the model, which must be one that `is_compared`."""
    config = inventory.config
    architecture = architecture_of(config)
    expected_types = ARCHITECTURES[architecture].model_types
    if config.get("model_type") not in expected_types:
        yield (
            f"{directory / CONFIG_FILE}: expected model_type {' or '.join(expected_types)} for {architecture}, found "
            f"{config.get('model_type')!r}. Restore the config.json of the float model."
        )
        return
    try:
        model = Decoder(config)
        modules = model.modules({name for name in inventory.modules if WEIGHT in inventory.module(name)})
    except SizeError as error:
        yield f"{directory / CONFIG_FILE}: {error}. Restore the config.json of the float model."
        return
    for name, module in modules.items():
        yield from _module_findings(name, module, inventory, directory)
    for name, info in inventory.tensors.items():
        module_name, _, suffix = name.rpartition(".")
        if inventory.is_useless(name) or (module_name in modules and suffix in _suffixes(module_name, inventory)):
            continue
        number = layer_number(name)
        if module_name in modules:
            what = f"is of no use to module {module_name}"
        elif number is not None and number >= model.layers:
            what = f"belongs to layer {number}, but the model of config.json has {model.layers} (num_hidden_layers)"
        else:
            what = f"belongs to module {module_name}, which {architecture} does not have"
        yield f"{info.file}: tensor {info.name} {what}. config.json and weights come from different models."


def expert_findings(inventory: "Inventory") -> Iterator[str]:
    """Experts that are not all there: vLLM would serve those that are missing with whatever their memory held."""
    projections: dict[str, dict[int, set[str]]] = {}
    for name in inventory.modules:
        parent, _, rest = name.rpartition(".experts.")
        digits, _, leaf = rest.partition(".")
        if parent and digits.isdecimal() and leaf and not inventory.is_useless(name):
            projections.setdefault(f"{parent}.experts", {}).setdefault(int(digits), set()).add(leaf)
    config = text_config(inventory.config)
    counts = (config.get(key) for key in ("num_experts", "n_routed_experts", "num_local_experts"))
    count = next((value for value in counts if isinstance(value, int)), 0)
    for prefix, experts in projections.items():
        leaves = {leaf for found in experts.values() for leaf in found}
        for number in range(max(count, max(experts) + 1)):
            if missing := sorted(leaves - experts.get(number, set())):
                yield (
                    f"layer {prefix}: expert {number} has no {', '.join(missing)}, other experts have. The checkpoint "
                    "is incomplete, or config.json is that of another model."
                )
                break


def is_compared(inventory: "Inventory") -> bool:
    """Whether `config_findings` knows the model, so that it can say which tensors there must be."""
    return bool(architecture_of(inventory.config))


def float_findings(inventory: "Inventory") -> Iterator[str]:
    """Weights and biases of FLOAT modules that are no floats, or that are not all that the module has."""
    for module, written in inventory.description.modules.items():
        for suffix, info in inventory.module(module).items():
            if inventory.is_useless(info.name):
                continue
            is_plain = suffix in (WEIGHT, BIAS)
            if (suffix == BIAS or (is_plain and written == QuantType.FLOAT)) and info.dtype not in FLOAT_DTYPES:
                yield (
                    f"{info.file}: layer {module}, tensor {info.name}: expected a float dtype "
                    f"({', '.join(FLOAT_DTYPES)}), found {info.dtype}. The description does not belong to these "
                    "weights; quantize the model again."
                )


def _suffixes(module: str, inventory: "Inventory") -> set[str]:
    """Of the tensors that a module may have, those of quantized layers included, which are checked elsewhere."""
    is_float = inventory.description.modules.get(module, QuantType.FLOAT) == QuantType.FLOAT
    return {WEIGHT, BIAS} if is_float else {WEIGHT, BIAS, *inventory.module(module)}


def _module_findings(name: str, module: ModuleShape, inventory: "Inventory", directory: Path) -> Iterator[str]:
    stored = inventory.module(name)
    needed = {WEIGHT: module.shape, **({BIAS: module.shape[:1]} if module.bias else {})}
    for suffix, shape in needed.items():
        info = stored.get(suffix)
        if info is None:
            yield (
                f"{directory}: tensor {name}.{suffix} is in none of the weight files, but the model of config.json has "
                "it. The checkpoint is incomplete, or config.json is that of another model."
            )
        elif (found := _unpacked_shape(inventory, name, suffix)) != shape:
            yield _wrong_shape(name, info.file, info.name, shape, found)
    bias = stored.get(BIAS)
    if bias is None or module.bias:
        return
    if not module.takes_bias:
        yield (
            f"{bias.file}: layer {name}, tensor {bias.name} is a bias, and neither the model of config.json has one "
            "there nor can one be added. Quantize the model without it."
        )
    elif bias.shape != module.shape[:1]:
        yield _wrong_shape(name, bias.file, bias.name, module.shape[:1], bias.shape)


def _unpacked_shape(inventory: "Inventory", module: str, suffix: str) -> tuple[int, ...]:
    stored, written = inventory.module(module), inventory.description.modules.get(module, "")
    is_known = suffix == WEIGHT and written in known_types()
    return matrix_shape(stored, QuantType(written)) if is_known else stored[suffix].shape


def _wrong_shape(layer: str, file: str, tensor: str, expected: tuple[int, ...], found: tuple[int, ...]) -> str:
    return (
        f"{file}: layer {layer}, tensor {tensor}: expected shape {list(expected)} (config.json), found {list(found)}. "
        "config.json and weights come from different models."
    )
