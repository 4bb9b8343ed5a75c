# SPDX-License-Identifier: Apache-2.0
"""What the methods for routed experts on CPUs and inside vllm-ascend share: checks of the model, the end of a load."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.checkpoint.experts import ExpertsPlan, undividable_experts

from .dummy import TYPICAL_SCALE, fill_with_plausible_values
from .parameters.base import require_filled, settle
from .schemes.experts_base import BaseExpertsScheme

if TYPE_CHECKING:
    from .report import LoadReport

RoutedExperts: TypeAlias = Any
"""The layer of vLLM or vllm-ascend. Its own type would make each of its parameters a "Tensor or Module"."""


class ExpertsMethod(FusedMoEMethodBase):
    """Connects the routed experts of one layer with their scheme.

    Args:
        moe: vLLM's description of the layer.
        plan: of the layer.
        scheme: of this layer; not shared with others.
        report: is told when the layer has been created and when it has been loaded.
        expect_weights: False if vLLM fills parameters with dummy values.
    """

    def __init__(
        self,
        moe: FusedMoEConfig,
        plan: ExpertsPlan,
        scheme: BaseExpertsScheme,
        report: "LoadReport",
        expect_weights: bool,
    ) -> None:
        super().__init__(moe)
        self.plan, self.scheme, self.report, self.expect_weights = plan, scheme, report, expect_weights

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        return None  # it describes operands of vLLM's own kernels, which are not used

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if self.expect_weights:
            require_filled(layer, self.plan.prefix)
        else:
            fill_with_plausible_values(layer)
            self.scheme.fill_dummy_scales(layer, TYPICAL_SCALE)
        settle(layer)
        self.scheme.process_weights_after_loading(layer)
        self.report.ready(self.scheme, layer)

    def _check_model(
        self, sizes: tuple[int, int, int], activation: MoEActivation, limits: Mapping[str, float | None]
    ) -> None:
        """Raise if the experts are not those of config.json, or if nothing here computes them as vLLM divides them.

        Args:
            sizes: number of experts, input and intermediate features, of config.json.
            activation: of the experts.
            limits: what changes the activation, by name; None where it does not.
        """
        plan, spec = self.plan, self.scheme.spec
        found = (plan.count, spec.input_size, spec.output_size)
        if found != sizes:
            raise CheckpointError(
                f"layer {plan.prefix}: expected {sizes[0]} experts with {sizes[1]} input and {sizes[2]} "
                f"intermediate features (config.json), found {found[0]} with {found[1]} and {found[2]}. config.json "
                "and weights come from different models."
            )
        changes = "".join(f" with {name} {value}" for name, value in limits.items() if value is not None)
        if activation != MoEActivation.SILU or changes:
            raise CheckpointError(
                f"layer {plan.prefix}: experts with the activation {activation.value}{changes} cannot be run in "
                f"{plan.quant_type}; silu(gate) * up can. Quantize the model again with FLOAT experts."
            )
        if self.moe.use_ep and (reason := undividable_experts(plan.prefix, plan.count, self.moe.ep_size)):
            raise CheckpointError(reason)
