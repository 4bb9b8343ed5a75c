# SPDX-License-Identifier: Apache-2.0
"""The method "ascend" inside vllm-ascend: its ModelSlim configuration, with our methods for W4A4 layers.

It is a subclass, because vllm-ascend's code reads attributes of the configuration and checks its class.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm_ascend.quantization import AscendModelSlimConfig

from vllm_w4a4_plugin.checkpoint import CheckpointError, QuantDescription
from vllm_w4a4_plugin.checkpoint.experts import plan_experts
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.plan import LayerPlan, plan_layer
from vllm_w4a4_plugin.checkpoint.resolve import checkpoint_name, expert_projections, shard_names
from vllm_w4a4_plugin.checkpoint.runnable import ON_NPU, kind_of, unsupported_reason
from vllm_w4a4_plugin.checkpoint.spec import kronecker_sizes
from vllm_w4a4_plugin.checkpoint.types import NPU, WEIGHT, known_types, runnable_types
from vllm_w4a4_plugin.constants import LOGGER
from vllm_w4a4_plugin.ops.npu import fused
from vllm_w4a4_plugin.ops.npu.select import Kernel, RankShape, select_kernel
from vllm_w4a4_plugin.ops.npu.self_check import select_working_kernel

from .ascend_experts import AscendW4A4NpuExpertsMethod
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
    """vllm-ascend's configuration; layers get our method if their type has an NPU scheme, else vllm-ascend's."""

    def __init__(self, quant_config: dict[str, Any] | None = None) -> None:
        super().__init__(quant_config)
        self.report = LoadReport()
        self.inventory = Inventory(self._description())

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        super().maybe_update_config(model_name, hf_config, revision)
        description = self._description()
        ours = {kind for kind in known_types() if NPU in kind.spec.runs_on | kind.spec.experts_run_on}
        has_ours = any(written in ours for written in description.tensors.values())
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
        if is_linear or isinstance(layer, RoutedExperts):
            # For some models, the prefixes of vllm-ascend differ from the names in the description.
            model_type = get_current_vllm_config().model_config.hf_config.model_type
            # From 0.27 on, vllm-ascend adds what vLLM's mapping lacks only here.
            if hasattr(self, "_update_packed_modules_mapping"):
                self._update_packed_modules_mapping(model_type)
            for name in dict.fromkeys((prefix, self.quant_prefix_mapper(model_type, prefix))):
                if not is_linear:
                    if self._has_experts_of_ours(name):
                        return self._experts_method(layer, name, kwargs.get("tid2eid"))
                elif self._has_shard_of_ours(name):
                    plan = plan_layer(name, self.inventory, self.packed_modules_mapping, _sizes(layer))
                    reason = unsupported_reason(name, plan.quant_type, kind_of(name), backends=ON_NPU)
                    if reason:
                        raise CheckpointError(reason)
                    why = self._why_theirs(layer, plan)
                    return self._theirs(layer, prefix, why, *args, **kwargs) if why else self._our_method(plan)
        why = "the plugin did not find it in the description" if is_linear else "not a linear layer"
        return self._theirs(layer, prefix, why, *args, **kwargs)

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

    def _has_experts_of_ours(self, prefix: str) -> bool:
        description = self.inventory.description
        types = {self._written_type(module) for module in expert_projections(description, prefix)}
        return any(kind in types and NPU in kind.spec.experts_run_on for kind in known_types())

    def _experts_method(self, layer: RoutedExperts, prefix: str, tid2eid: Any) -> AscendW4A4NpuExpertsMethod:
        moe = layer.moe_config
        sizes = (moe.hidden_dim, moe.intermediate_size_per_partition * moe.tp_size)
        plan = plan_experts(prefix, self.inventory, sizes, ON_NPU)
        return AscendW4A4NpuExpertsMethod(moe, plan, self.report, not loads_dummy_weights(), tid2eid)

    def _our_method(self, plan: LayerPlan) -> AscendW4A4NpuLinearMethod:
        scheme = new_scheme(plan, self.report.packed, NPU)
        assert scheme is not None  # one of the shards has a type of ours, so all have
        return AscendW4A4NpuLinearMethod(scheme, self.report, not loads_dummy_weights())

    def _why_theirs(self, layer: LinearBase, plan: LayerPlan) -> str:
        """Why a W4A4 linear layer is left to vllm-ascend, "" if it is not: all our kernels failed, and theirs fits."""
        spec = plan.spec
        assert spec is not None
        is_split = isinstance(layer, RowParallelLinear) and get_tensor_model_parallel_world_size() > 1
        has_transform = spec.quant_type.spec.has_transform
        fits = not has_transform or (spec.left, spec.right) == kronecker_sizes(spec.input_size)
        if is_split or not fits:
            return ""
        shape, has_library = RankShape.of(spec), not fused.unavailable_reason()
        if select_kernel(shape, has_fused_library=has_library).kernel is Kernel.NONE:
            return ""
        device = torch.get_default_device()
        choice = select_working_kernel(shape, layer.params_dtype, spec.has_bias, device, has_fused_library=has_library)
        return choice.reason if choice.kernel is Kernel.NONE else ""

    def _theirs(
        self, layer: torch.nn.Module, prefix: str, why: str, *args: Any, **kwargs: Any
    ) -> QuantizeMethodBase | None:
        """vllm-ascend's method. Linear layers and quantized heads go into the table, any W4A4 layer into the log."""
        method = super().get_quant_method(layer, prefix, *args, **kwargs)
        scheme = type(getattr(method, "quant_method", method)).__name__
        modules = self._modules(prefix)
        remark = ""
        if "W4A4" in scheme:
            remark = f"{prefix}: {why}"
            logger.warning("%s. It runs in vllm-ascend's own %s.", remark, scheme)
        elif isinstance(layer, VocabParallelEmbedding) and hasattr(method, "quant_method"):
            remark = prefix
        elif not isinstance(layer, LinearBase):
            return method
        weights = (self.inventory.module(module).get(WEIGHT) for module in modules)
        weight_bytes = sum(info.nbytes for info in weights if info)
        self.report.others(self._written_type(modules[0]), f"vllm-ascend {scheme}", weight_bytes, remark)
        return method


def _sizes(layer: LinearBase) -> tuple[int, int]:
    return layer.input_size, layer.output_size
