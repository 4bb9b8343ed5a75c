# SPDX-License-Identifier: Apache-2.0
"""The method "ascend" beside vllm-ascend: its ModelSlim configuration, with our method for W4A4 linear layers.

A subclass, because vllm-ascend's own code reads attributes of the configuration and asks for its class.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm_ascend.quantization.modelslim_config import AscendModelSlimConfig

from vllm_w4a4_plugin.checkpoint import QuantDescription, QuantType, TensorInfo
from vllm_w4a4_plugin.checkpoint.layer import LinearSpec, agreeing_spec, assumed_spec, linear_spec
from vllm_w4a4_plugin.checkpoint.resolve import checkpoint_name, resolve, shard_names

from .linear import AscendW4A4LinearMethod
from .parameters import LayerSource
from .report import LoadReport
from .schemes import LinearScheme
from .schemes.w4a4_npu import W4A4NpuScheme
from .source import loads_dummy_weights, tensor_headers

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = init_logger("vllm.plugins.w4a4")

OURS = tuple(kind for kind in QuantType if kind.is_w4a4)


@register_weight_loader_v2_supported_method
class AscendW4A4NpuLinearMethod(AscendW4A4LinearMethod):
    """Our linear method with the attribute by which vllm-ascend looks at the schemes of its own."""

    @property
    def quant_method(self) -> LinearScheme:
        return self.scheme


class AscendW4A4ModelSlimConfig(AscendModelSlimConfig):
    """vllm-ascend's configuration; linear layers of the types `OURS` get our method, everything else its own."""

    def __init__(self, quant_config: dict[str, Any] | None = None) -> None:
        super().__init__(quant_config)
        self.report = LoadReport()
        # Both keyed by tensor names as vLLM spells them; the values keep the checkpoint's names.
        self._tensors: dict[str, TensorInfo] = {}
        self._original: dict[str, str] = {}
        self._describe()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        super().maybe_update_config(model_name, hf_config, revision)
        self._describe()
        if any(kind in OURS for kind in self._description.tensors.values()):
            self._tensors = tensor_headers(model_name, revision)
            self._original = {name: name for name in {**self._description.tensors, **self._tensors}}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        before = self.quant_description
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        if self.quant_description is not before:
            self._tensors = hf_to_vllm_mapper.apply_dict(self._tensors)
            self._original = hf_to_vllm_mapper.apply_dict(self._original)
            self._describe()

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str, *args: Any, **kwargs: Any
    ) -> QuantizeMethodBase | None:
        is_linear = isinstance(layer, LinearBase)
        if is_linear:
            # vllm-ascend spells the prefixes of some models differently from the checkpoint's description.
            model_type = get_current_vllm_config().model_config.hf_config.model_type
            for name in dict.fromkeys((prefix, self.quant_prefix_mapper(model_type, prefix))):
                if self._has_w4a4_shard(name):
                    return self._w4a4_method(layer, name)
        method = super().get_quant_method(layer, prefix, *args, **kwargs)
        self._report_theirs(prefix, method, is_linear)
        return method

    def _describe(self) -> None:
        """Take the tensors' types over from vllm-ascend's dictionary, which holds other things too."""
        types = {name: kind for name, kind in self.quant_description.items() if "." in name and isinstance(kind, str)}
        self._description = QuantDescription(tensors=types, group_size=self.quant_description.get("group_size"))

    def _shards(self, prefix: str) -> list[str]:
        names = shard_names(prefix, self.packed_modules_mapping)
        return [checkpoint_name(self._description, name) or name for name in names]

    def _has_w4a4_shard(self, prefix: str) -> bool:
        return any(self._description.tensors.get(f"{shard}.weight") in OURS for shard in self._shards(prefix))

    def _w4a4_method(self, layer: LinearBase, prefix: str) -> AscendW4A4NpuLinearMethod:
        quant_type = resolve(self._description, prefix, self.packed_modules_mapping)
        shards = self._shards(prefix)
        spec = agreeing_spec(prefix, [self._spec(layer, shard, quant_type) for shard in shards])
        source = LayerSource(
            prefix=prefix,
            quant_type=quant_type,
            shards=tuple(self._original.get(f"{s}.weight", f"{s}.weight").removesuffix(".weight") for s in shards),
            files={i.name: i.file for s in shards for n, i in self._tensors.items() if n.startswith(f"{s}.")},
            on_packed=self.report.packed,
        )
        return AscendW4A4NpuLinearMethod(W4A4NpuScheme(spec, source), self.report, not loads_dummy_weights())

    def _spec(self, layer: LinearBase, shard: str, quant_type: QuantType) -> LinearSpec:
        if self._tensors:
            return linear_spec(self._tensors, shard, quant_type)
        return assumed_spec(self._description, shard, quant_type, layer.input_size, layer.output_size)

    def _report_theirs(self, prefix: str, method: QuantizeMethodBase | None, is_linear: bool) -> None:
        """Linear layers go into the table; W4A4 layers that stay with vllm-ascend are named, whatever they are."""
        scheme = type(getattr(method, "quant_method", method)).__name__
        shards = self._shards(prefix)
        kind = self._description.tensors.get(f"{shards[0]}.weight", "")
        remark = ""
        if "W4A4" in scheme:
            why = "not found in the description by the plugin" if is_linear else "not a linear layer"
            remark = f"{prefix}: {why}"
            logger.warning("%s. It runs in vllm-ascend's own %s.", remark, scheme)
        elif not is_linear:
            return
        weights = (self._tensors.get(f"{shard}.weight") for shard in shards)
        self.report.others(kind, f"vllm-ascend {scheme}", sum(info.nbytes for info in weights if info), remark)
