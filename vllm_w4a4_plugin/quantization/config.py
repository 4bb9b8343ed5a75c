# SPDX-License-Identifier: Apache-2.0
"""vLLM's quantization method "ascend": msModelSlim checkpoints, one linear method per layer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from vllm_w4a4_plugin import METHOD
from vllm_w4a4_plugin.checkpoint import CheckpointError, QuantDescription, QuantType, TensorInfo
from vllm_w4a4_plugin.checkpoint.layer import LinearSpec, agreeing_spec, assumed_spec, linear_spec, unsupported
from vllm_w4a4_plugin.checkpoint.resolve import checkpoint_name, module_type, resolve, resolve_experts, shard_names

from .cpu_dtype import cost_of_float32
from .linear import AscendW4A4LinearMethod
from .parameters import LayerSource
from .report import LoadReport
from .schemes import SCHEMES
from .source import loads_dummy_weights, open_checkpoint

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper


class AscendW4A4Config(QuantizationConfig):
    """Parses `quant_model_description.json` and chooses a method for each layer.

    vLLM constructs it without arguments (`get_config_filenames` names no file) and then calls
    `maybe_update_config`, so that reading the description, and every error in it, is in our hands.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = ""
        self.description = QuantDescription()
        self.report = LoadReport()
        # Both keyed by tensor names as vLLM spells them; the values keep the checkpoint's names.
        self._original: dict[str, str] = {}
        self._tensors: Mapping[str, TensorInfo] = {}

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        raise CheckpointError(where_it_runs())

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AscendW4A4Config":
        """`config` is a `quantization_config` in config.json; the description file says all that is needed."""
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """`--quantization ascend` wins over whatever config.json says."""
        return METHOD if METHOD in (user_quant, (hf_quant_cfg or {}).get("quant_method")) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the description of `model_name`, a directory or a hub repository, and check the weight headers.

        Raises:
            CheckpointError: anything that would keep the model from loading, or a platform that cannot run it.
        """
        if not current_platform.is_cpu():
            raise CheckpointError(where_it_runs())
        self.model = model_name
        self.description, tensors = open_checkpoint(model_name, revision)
        self._original = {name: name for name in self.description.tensors}
        self._tensors = tensors
        self._refuse_quantized_cache()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Spell tensor names as vLLM does."""
        self._original = hf_to_vllm_mapper.apply_dict(self._original)
        self._tensors = hf_to_vllm_mapper.apply_dict(dict(self._tensors))
        self.description = self.description.renamed(hf_to_vllm_mapper.apply_dict)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return self._linear_method(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            name = checkpoint_name(self.description, prefix)
            if name is not None and module_type(self.description, name) is not QuantType.FLOAT:
                raise CheckpointError(unsupported(prefix, module_type(self.description, name)))
        elif isinstance(layer, RoutedExperts):
            expert_type = resolve_experts(self.description, prefix)
            if expert_type is not QuantType.FLOAT:
                raise CheckpointError(unsupported(prefix, expert_type))
        return None

    def bytes_of_float32(self) -> int:
        """Bytes that the unquantized parameters take more in float32 than in the dtype they are stored in."""
        return cost_of_float32(self._tensors.values())

    def _linear_method(self, layer: LinearBase, prefix: str) -> QuantizeMethodBase:
        quant_type = resolve(self.description, prefix, self.packed_modules_mapping)
        shards = [
            checkpoint_name(self.description, shard) or shard
            for shard in shard_names(prefix, self.packed_modules_mapping)
        ]
        if quant_type is QuantType.FLOAT:
            self.report.float_layer(sum(self._weight_bytes(shard) for shard in shards))
            return UnquantizedLinearMethod()
        if quant_type not in SCHEMES:
            raise CheckpointError(unsupported(prefix, quant_type))
        spec = agreeing_spec(prefix, [self._spec(layer, shard, quant_type) for shard in shards])
        source = LayerSource(
            prefix=prefix,
            quant_type=quant_type,
            shards=tuple(self._original.get(f"{s}.weight", f"{s}.weight").removesuffix(".weight") for s in shards),
            files={i.name: i.file for s in shards for n, i in self._tensors.items() if n.startswith(f"{s}.")},
            on_packed=self.report.packed,
        )
        return AscendW4A4LinearMethod(SCHEMES[quant_type](spec, source), self.report, not loads_dummy_weights())

    def _spec(self, layer: LinearBase, shard: str, quant_type: QuantType) -> LinearSpec:
        if self._tensors:
            return linear_spec(self._tensors, shard, quant_type)
        return assumed_spec(self.description, shard, quant_type, layer.input_size, layer.output_size)

    def _weight_bytes(self, shard: str) -> int:
        info = self._tensors.get(f"{shard}.weight")
        return info.nbytes if info else 0

    def _refuse_quantized_cache(self) -> None:
        for key in ("kv_quant_type", "kv_cache_type", "fa_quant_type"):
            value = getattr(self.description, key)
            if value not in (None, "", QuantType.FLOAT.value):
                raise CheckpointError(
                    f"{self.model}/quant_model_description.json: {key} is {value!r}, but a quantized KV cache or "
                    "attention cannot be run on CPU. Quantize the model without it."
                )


def where_it_runs() -> str:
    """Message for platforms that have no W4A4 kernels."""
    return (
        f'quantization "{METHOD}" (msModelSlim W4A4) runs on CPUs (x86-64 and Arm, with vLLM\'s CPU build) and on '
        f"Ascend NPUs (with vllm-ascend); this vLLM runs on {current_platform.device_name or 'an unknown device'}. "
        "Install vLLM for one of those, or use a checkpoint of another quantization."
    )
