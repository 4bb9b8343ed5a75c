# SPDX-License-Identifier: Apache-2.0
"""vLLM's quantization method "ascend": msModelSlim checkpoints, one linear method per layer."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint import CheckpointError, QuantDescription, QuantType
from vllm_w4a4_plugin.checkpoint.accounting import cache_findings
from vllm_w4a4_plugin.checkpoint.experts import plan_experts
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.plan import plan_layer
from vllm_w4a4_plugin.checkpoint.resolve import checkpoint_name, module_type
from vllm_w4a4_plugin.checkpoint.runnable import Kind, kind_of, unsupported_reason
from vllm_w4a4_plugin.constants import LOGGER, METHOD
from vllm_w4a4_plugin.ops.cpu import cpu_instruction_set, load_library

from .experts import AscendW4A4ExpertsMethod
from .float_linear import SharedOutFloatMethod, is_shared_out, sent_bytes
from .head import RotatedHeadMethod
from .linear import AscendW4A4LinearMethod
from .report import LoadReport
from .schemes import new_scheme
from .source import has_description, loads_dummy_weights, open_checkpoint
from .stored_head import StoredHeadMethod

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = init_logger(LOGGER)

DRAFT_PREFIX = "draft_model."


class AscendW4A4Config(QuantizationConfig):
    """Parses `quant_model_description.json` and chooses a method for each layer.

    vLLM constructs it without arguments (`get_config_filenames` names no file) and then calls `maybe_update_config`, so
    that the plugin itself reads the description and reports what is wrong with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = ""
        self.inventory = Inventory(QuantDescription())
        self.report = LoadReport()

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
        """`config`, a `quantization_config` of config.json, is ignored; the description file has all that is needed."""
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """`--quantization ascend`, or a description next to the weights, takes precedence over config.json.

        A `quantization_config` that the float model had would otherwise choose a loader for other weights.
        """
        if METHOD in (user_quant, (hf_quant_cfg or {}).get("quant_method")):
            return METHOD
        model = getattr(hf_config, "_name_or_path", "")
        return METHOD if user_quant is None and model and has_description(model) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the description of `model_name`, a directory or a hub repository, and check the weight headers.

        Raises:
            CheckpointError: anything that would keep the model from loading, or a platform that cannot run it.
            RuntimeError: the CPU kernels were not built, or not for this environment.
        """
        if not current_platform.is_cpu():
            raise CheckpointError(where_it_runs())
        load_library()
        self.model = model_name
        self.inventory = open_checkpoint(model_name, revision).with_numbered_mtp_layers()
        if assumed := self.inventory.assumed_float:
            logger.info_once(
                "%d tensors have no entry in the description and are in float: taken as FLOAT, e.g. %s",
                len(assumed),
                assumed[0],
            )
        for finding in cache_findings(self.inventory.description):
            raise CheckpointError(f"{model_name}/{finding}")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Map the tensor names of the checkpoint to those of vLLM's model."""
        self.inventory = self.inventory.renamed(hf_to_vllm_mapper.apply_dict)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        description = self.inventory.description
        # vLLM names the modules of a draft model so. The configuration is the draft's own: its checkpoint does not.
        prefix = prefix.removeprefix(DRAFT_PREFIX)
        if isinstance(layer, LinearBase):
            return self._linear_method(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            name = checkpoint_name(description, prefix)
            quant_type = QuantType.FLOAT if name is None else module_type(description, name)
            kind = Kind.HEAD if isinstance(layer, ParallelLMHead) else Kind.EMBEDDING
            _require(unsupported_reason(prefix, quant_type, kind))
            if isinstance(layer, ParallelLMHead):
                return self._stored_head(layer, prefix) if quant_type.spec.is_quantized else self._head_method(layer)
        elif isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        return None

    def _stored_head(self, layer: ParallelLMHead, prefix: str) -> QuantizeMethodBase:
        sizes = (layer.embedding_dim, layer.org_vocab_size)
        scheme = new_scheme(plan_layer(prefix, self.inventory, {}, sizes), self.report.packed)
        assert scheme is not None  # the types that heads can have here have one
        return StoredHeadMethod(scheme, self.report, not loads_dummy_weights())

    def _head_method(self, layer: ParallelLMHead) -> QuantizeMethodBase | None:
        bits = {"float": None, "int8": 8, "int4": 4}[envs.VLLM_W4A4_HEAD]
        if bits is None:
            return None
        weight_bytes = layer.num_embeddings_per_partition * layer.embedding_dim * bits // 8
        operator = f"vllm_w4a4::{'w8a8_linear' if bits == 8 else 'flatquant_linear'}, {cpu_instruction_set()}"
        self.report.others(QuantType.FLOAT.value, operator, weight_bytes, f"output head in int{bits} (VLLM_W4A4_HEAD)")
        return RotatedHeadMethod(bits)

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        config = layer.moe_config
        sizes = (config.hidden_dim, config.intermediate_size)
        plan = plan_experts(prefix, self.inventory, sizes)
        if not plan.quant_type.spec.is_quantized:
            self.report.others(plan.quant_type.value, "vLLM unquantized experts", plan.weight_bytes)
            return None
        return AscendW4A4ExpertsMethod(config, plan, self.report, not loads_dummy_weights())

    def _linear_method(self, layer: LinearBase, prefix: str) -> QuantizeMethodBase:
        sizes = (layer.input_size, layer.output_size)
        plan = plan_layer(prefix, self.inventory, self.packed_modules_mapping, sizes)
        if not plan.quant_type.spec.is_quantized:
            if is_shared_out(layer):
                self.report.float_layer(plan.weight_bytes, sent_bytes(layer))
                return SharedOutFloatMethod()
            self.report.float_layer(plan.weight_bytes)
            return UnquantizedLinearMethod()
        _require(unsupported_reason(prefix, plan.quant_type, kind_of(prefix), plan.spec))
        scheme = new_scheme(plan, self.report.packed)
        assert scheme is not None  # the types that run here have one
        return AscendW4A4LinearMethod(scheme, self.report, not loads_dummy_weights())


def _require(unsupported: str) -> None:
    if unsupported:
        raise CheckpointError(unsupported)


def where_it_runs() -> str:
    """Message for platforms that have no W4A4 kernels."""
    return (
        f'quantization "{METHOD}" (msModelSlim W4A4) runs on CPUs (x86-64 and Arm, with vLLM\'s CPU build) and on '
        f"Ascend NPUs (with vllm-ascend); this vLLM runs on {current_platform.device_name or 'an unknown device'}. "
        "Install vLLM for one of those, or use a checkpoint that is quantized with another method."
    )
