# SPDX-License-Identifier: Apache-2.0
"""The method "ascend" inside vllm-ascend: its ModelSlim configuration, with our method for W4A4 linear layers.

It is a subclass, because vllm-ascend's code reads attributes of the configuration and checks its class.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm_ascend.quantization import AscendModelSlimConfig

from vllm_w4a4_plugin.checkpoint import QuantDescription
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.plan import plan_layer
from vllm_w4a4_plugin.checkpoint.resolve import checkpoint_name, shard_names
from vllm_w4a4_plugin.checkpoint.types import NPU, WEIGHT, runnable_types
from vllm_w4a4_plugin.constants import LOGGER

from .linear import AscendW4A4LinearMethod
from .report import LoadReport
from .schemes import LinearScheme, compiled_graphs, new_scheme, w4a4_npu  # noqa: F401 - registers the NPU's schemes
from .source import loads_dummy_weights, tensor_headers

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = init_logger(LOGGER)
compiled_graphs.hash_kernels()


@register_weight_loader_v2_supported_method
class AscendW4A4NpuLinearMethod(AscendW4A4LinearMethod):
    """Our linear method, with the attribute through which vllm-ascend's code reads the scheme of a layer."""

    @property
    def quant_method(self) -> LinearScheme:
        return self.scheme


class AscendW4A4ModelSlimConfig(AscendModelSlimConfig):
    """vllm-ascend's configuration; linear layers get our method if their type has an NPU scheme, else vllm-ascend's."""

    def __init__(self, quant_config: dict[str, Any] | None = None) -> None:
        super().__init__(quant_config)
        self.report = LoadReport()
        self.inventory = Inventory(self._description())

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        super().maybe_update_config(model_name, hf_config, revision)
        description = self._description()
        has_ours = any(written in runnable_types(NPU) for written in description.tensors.values())
        self.inventory = Inventory(description, tensor_headers(model_name, revision) if has_ours else {})

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        before = self.quant_description
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        if self.quant_description is not before:
            self.inventory = self.inventory.renamed(hf_to_vllm_mapper.apply_dict, self._description())

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str, *args: Any, **kwargs: Any
    ) -> QuantizeMethodBase | None:
        is_linear = isinstance(layer, LinearBase)
        if is_linear:
            # For some models, the prefixes of vllm-ascend differ from the names in the description.
            model_type = get_current_vllm_config().model_config.hf_config.model_type
            # From 0.27 on, vllm-ascend adds what vLLM's mapping lacks only here.
            if hasattr(self, "_update_packed_modules_mapping"):
                self._update_packed_modules_mapping(model_type)
            for name in dict.fromkeys((prefix, self.quant_prefix_mapper(model_type, prefix))):
                if self._has_shard_of_ours(name):
                    return self._our_method(layer, name)
        method = super().get_quant_method(layer, prefix, *args, **kwargs)
        self._report_theirs(prefix, method, is_linear)
        return method

    def _description(self) -> QuantDescription:
        """The types of the tensors from vllm-ascend's dictionary, which has other keys too."""
        types = {name: kind for name, kind in self.quant_description.items() if "." in name and isinstance(kind, str)}
        return QuantDescription(tensors=types, group_size=self.quant_description.get("group_size"))

    def _modules(self, prefix: str) -> list[str]:
        names = shard_names(self.inventory.description, prefix, self.packed_modules_mapping)
        return [checkpoint_name(self.inventory.description, name) or name for name in names]

    def _written_type(self, module: str) -> str:
        return self.inventory.description.modules.get(module, "")

    def _has_shard_of_ours(self, prefix: str) -> bool:
        return any(self._written_type(module) in runnable_types(NPU) for module in self._modules(prefix))

    def _our_method(self, layer: LinearBase, prefix: str) -> AscendW4A4NpuLinearMethod:
        plan = plan_layer(prefix, self.inventory, self.packed_modules_mapping, (layer.input_size, layer.output_size))
        scheme = new_scheme(plan, self.report.packed, NPU)
        assert scheme is not None  # one of the shards has a type of ours, so all have
        return AscendW4A4NpuLinearMethod(scheme, self.report, not loads_dummy_weights())

    def _report_theirs(self, prefix: str, method: QuantizeMethodBase | None, is_linear: bool) -> None:
        """Add a linear layer that vllm-ascend runs to the table; warn of any W4A4 layer that it runs, linear or not."""
        scheme = type(getattr(method, "quant_method", method)).__name__
        modules = self._modules(prefix)
        remark = ""
        if "W4A4" in scheme:
            why = "the plugin did not find it in the description" if is_linear else "not a linear layer"
            remark = f"{prefix}: {why}"
            logger.warning("%s. It runs in vllm-ascend's own %s.", remark, scheme)
        elif not is_linear:
            return
        weights = (self.inventory.module(module).get(WEIGHT) for module in modules)
        weight_bytes = sum(info.nbytes for info in weights if info)
        self.report.others(self._written_type(modules[0]), f"vllm-ascend {scheme}", weight_bytes, remark)
