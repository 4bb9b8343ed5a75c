# SPDX-License-Identifier: Apache-2.0
"""Whatever `select_kernel` answers, the loader, `doctor` and the quantizer say the same."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_w4a4_plugin.calibration.model.structure import Role
from vllm_w4a4_plugin.calibration.recipe import RECIPES
from vllm_w4a4_plugin.calibration.run.npu_notes import npu_notes
from vllm_w4a4_plugin.calibration.transforms.sizes import stored_factors
from vllm_w4a4_plugin.capacity.kernels import kernel_of
from vllm_w4a4_plugin.capacity.partition import sizes_on_rank
from vllm_w4a4_plugin.checkpoint import CheckpointError, QuantType
from vllm_w4a4_plugin.checkpoint.plan import LayerPlan
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.checkpoint.types import NPU, runnable_types
from vllm_w4a4_plugin.ops.npu import fused
from vllm_w4a4_plugin.ops.npu.select import Kernel, KernelChoice, RankShape, select_kernel
from vllm_w4a4_plugin.quantization.schemes import LayerShape, new_scheme, w4a4_npu

FLATQUANT = QuantType.W4A4_FLATQUANT_DYNAMIC

factors = st.one_of(st.none(), st.integers(1, 300))


@st.composite
def layers(draw: st.DrawFn) -> tuple[LinearSpec, int]:
    """A column- or row-parallel layer of any type that is described, and a number of ranks that divides it."""
    kind = draw(st.sampled_from([FLATQUANT, QuantType.W4A4_DYNAMIC, QuantType.W8A8_DYNAMIC, QuantType.FLOAT]))
    ranks = draw(st.sampled_from([1, 2, 4]))
    left, right = (draw(factors), draw(factors)) if kind is FLATQUANT else (None, None)
    input_size = (left or 1) * (right or 1)
    if left is None or right is None:
        input_size *= draw(st.integers(1, 40))
    input_size *= 1 if input_size % ranks == 0 and kind is FLATQUANT else ranks
    if left is not None and right is not None and input_size != left * right:
        ranks, input_size = 1, left * right
    name = draw(st.sampled_from(["gate_proj", "down_proj"]))
    groups = draw(st.sampled_from([1, 1, 2])) if kind is QuantType.W4A4_DYNAMIC and input_size % 2 == 0 else 1
    return LinearSpec(f"m.{name}", kind, 16 * ranks * draw(st.integers(1, 8)), input_size, groups, left, right), ranks


def loaders_choice(spec: LinearSpec, sizes: tuple[int, int], ranks: int, has_fused: bool) -> KernelChoice:
    """What the loader inside vllm-ascend does with a layer."""
    if spec.quant_type not in runnable_types(NPU):
        assert new_scheme(LayerPlan(spec.name, spec.quant_type, (spec.name,), spec), lambda: None, NPU) is None
        return KernelChoice(Kernel.VLLM_ASCEND)
    scheme: Any = new_scheme(LayerPlan(spec.name, spec.quant_type, (spec.name,), spec), lambda: None, NPU)
    layer: Any = torch.nn.Module()
    layer.tp_size = ranks
    absent = "" if has_fused else "not built"
    rank = {"get_tensor_model_parallel_rank": lambda: 0, "get_tensor_model_parallel_world_size": lambda: ranks}
    with (
        patch.multiple("vllm.model_executor.parameter", **rank),
        patch.object(w4a4_npu, "get_tensor_model_parallel_world_size", lambda: ranks),
        patch.object(fused, "unavailable_reason", lambda: absent),
        torch.device("meta"),
    ):
        try:
            scheme.create_weights(layer, LayerShape(*sizes, spec.input_size, torch.bfloat16), lambda *_: None)
        except CheckpointError as error:
            return KernelChoice(Kernel.NONE, str(error).removeprefix(f"layer {spec.name}: ").partition(". Quantize")[0])
    return KernelChoice(scheme.kernel, scheme.reason)


@settings(deadline=None, max_examples=300)
@given(layers(), st.booleans())
def test_loader_and_doctor_agree(layer: tuple[LinearSpec, int], has_fused: bool) -> None:
    spec, ranks = layer
    model: Any = SimpleNamespace(kv_heads=8, has_whole_experts=False)
    sizes = sizes_on_rank(spec, model, ranks)
    expected = select_kernel(RankShape.of(spec, *sizes), has_fused_library=has_fused)
    assert loaders_choice(spec, sizes, ranks, has_fused) == expected
    if not has_fused:
        assert kernel_of(spec, model, ranks) == expected


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 12), st.integers(1, 400), st.sampled_from([16, 64, 66, 128]), st.sampled_from(list(RECIPES)))
def test_loader_and_quantizer_agree(heads: int, mlp: int, head: int, recipe: str) -> None:
    """`down` has both factors stored, so its spec follows from its input size alone."""
    config = SimpleNamespace(
        hidden_size=heads * head,
        intermediate_size=8 * mlp,
        head_dim=head,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    kind = RECIPES[recipe][Role.DOWN]
    left, right = stored_factors(Role.DOWN, 8 * mlp, head) if kind.spec.has_transform else (None, None)
    spec = LinearSpec("m.down_proj", kind, heads * head, 8 * mlp, 1, left, right)
    choice = loaders_choice(spec, (spec.output_size, spec.input_size), 1, has_fused=False)
    notes = npu_notes(config, [(Role.DOWN, kind)])
    if not choice.reason:
        assert notes == []
    elif choice.kernel is Kernel.NONE:
        assert notes == [f"down layers of type {kind} cannot run: {choice.reason}."]
    else:
        assert notes == [f"down layers of type {kind} will run as {choice.kernel}: {choice.reason}."]


@pytest.mark.parametrize(
    ("left", "right", "kernel", "word"),
    [
        (64, 80, Kernel.KRONECKER, ""),
        (64, None, Kernel.UNFUSED, "no right_trans"),
        (257, 8, Kernel.UNFUSED, "at most 256"),
        (8, 12, Kernel.UNFUSED, "a multiple of 8"),
        (3, 4, Kernel.NONE, "12 input features"),
    ],
)
def test_limits_of_the_documents(left: int, right: int | None, kernel: Kernel, word: str) -> None:
    shape = RankShape(FLATQUANT, 64, left * (right or 80), 1, left, right)
    choice = select_kernel(shape, has_fused_library=False)
    assert choice.kernel is kernel
    assert word in choice.reason


@pytest.mark.parametrize(
    ("left", "right", "kernels"),
    [
        (12, 16, [Kernel.FUSED, Kernel.KRONECKER, Kernel.UNFUSED, Kernel.NONE]),
        (12, None, [Kernel.FUSED, Kernel.UNFUSED, Kernel.NONE]),
    ],
)
def test_a_broken_kernel_gives_way_to_the_next(left: int, right: int | None, kernels: list[Kernel]) -> None:
    shape = RankShape(FLATQUANT, 64, 192, 1, left, right)
    broken: dict[Kernel, str] = {}
    for kernel in kernels:
        choice = select_kernel(shape, has_fused_library=True, broken=broken)
        assert choice.kernel is kernel
        assert all(f"self check: {name} computes nonsense" in choice.reason for name in broken)
        broken[kernel] = "computes nonsense"
