# SPDX-License-Identifier: Apache-2.0
"""Experts on the stand-in: what gives way, what is refused, what is loaded again, and what `doctor` says of it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch_npu
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.model_executor.layers.fused_moe import MoEActivation

from tests.mixtures import EXPERTS, HIDDEN, INTERMEDIATE, PER_GROUP, write, write_mixture
from tests.npu.expert_layers import Experts, fill, load, relative, routed
from tests.npu.test_experts import through
from vllm_w4a4_plugin.capacity.kernels import kernels_of
from vllm_w4a4_plugin.capacity.model import read_model
from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.experts import plan_experts
from vllm_w4a4_plugin.checkpoint.inventory import Inventory
from vllm_w4a4_plugin.checkpoint.runnable import ON_NPU
from vllm_w4a4_plugin.checkpoint.verify import header_findings
from vllm_w4a4_plugin.device_check import plan, steps
from vllm_w4a4_plugin.device_check.layers import Session
from vllm_w4a4_plugin.device_check.plan_experts import expert_layers, expert_steps
from vllm_w4a4_plugin.ops.npu import experts_check, self_check
from vllm_w4a4_plugin.ops.npu.select_experts import Product
from vllm_w4a4_plugin.quantization.ascend_experts import AscendW4A4NpuExpertsMethod
from vllm_w4a4_plugin.quantization.dummy import TYPICAL_SCALE, fill_with_plausible_values

pytestmark = pytest.mark.usefixtures("config")
PREFIX = "model.layers.0.mlp.experts"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """As in a process that has checked nothing."""
    for module in (experts_check, self_check):
        module._fault_of.cache_clear()
    yield
    for module in (experts_check, self_check):
        module._fault_of.cache_clear()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a mixture with one layer of a kind, after a change of its tensors."""

    def make(kind: str, change: Callable[[Tensors], None] = lambda tensors: None) -> Path:
        tensors = write_mixture(tmp_path, (kind,))
        change(tensors)
        types = {name: kind.split()[0] if ".experts." in name and "bias" not in name else "FLOAT" for name in tensors}
        write(tmp_path, tensors, types)
        return tmp_path

    return make


def with_biases(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight") and ".experts." in name]:
        size = tensors[name].shape[0]
        generator = torch.Generator().manual_seed(size)
        tensors[name.replace(".weight", ".bias")] = torch.randn(size, generator=generator)


def break_grouped(monkeypatch: pytest.MonkeyPatch, is_broken: Callable[[torch.dtype], bool]) -> None:
    operator = torch_npu.npu_grouped_matmul

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        if is_broken(x[0].dtype):
            raise RuntimeError("aclnnGroupedMatmulV5: EZ1001\n[TRACEBACK]")
        return operator(x, *args, **kwargs)

    monkeypatch.setattr(torch_npu, "npu_grouped_matmul", call)


def doctors_kernels(directory: Path) -> set[tuple[str, str]]:
    return {(k.kernel, k.reason) for k in kernels_of(read_model(directory), 1) if k.quant_type.startswith("W4A4")}


@pytest.mark.parametrize("kind", ["W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC", PER_GROUP])
def test_doctor_says_what_loading_does(checkpoint: Callable[..., Path], kind: str) -> None:
    directory = checkpoint(kind)
    assert list(header_findings(CheckpointReader(directory), ON_NPU)) == []
    scheme, _ = load(directory, PREFIX, range(EXPERTS))
    assert doctors_kernels(directory) == {(scheme.operator, scheme.choice.reason)}


def test_biased_experts_are_multiplied_one_by_one(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("W4A4_DYNAMIC", with_biases)
    scheme, layer = load(directory, PREFIX, range(EXPERTS))
    assert doctors_kernels(directory) == {(scheme.operator, scheme.choice.reason)}
    assert scheme.choice.product is Product.PER_EXPERT
    reader = CheckpointReader(directory)
    x, ids, weights = routed(9, HIDDEN, EXPERTS)
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(9):
        for expert, share in zip(ids[token].tolist(), weights[token].double(), strict=True):
            gate, up = (plain(reader, expert, leaf, x[token].double()) for leaf in ("gate_proj", "up_proj"))
            expected[token] += share * plain(reader, expert, "down_proj", torch.nn.functional.silu(gate) * up)
    assert relative(through(scheme, layer, x, ids, weights), expected) < 0.1


def plain(reader: CheckpointReader, expert: int, leaf: str, x: torch.Tensor) -> torch.Tensor:
    """A biased W4A4_DYNAMIC linear by the formula."""
    t = {s: reader.load(f"{PREFIX}.{expert}.{leaf}.{s}").double() for s in ("weight", "weight_scale", "bias")}
    scale = x.abs().max() / 7
    return (t["weight"] @ (x / scale).round()) * t["weight_scale"][:, 0] * scale + t["bias"]


def test_one_by_one_cannot_be_captured(
    config: VllmConfig, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config.compilation_config, "cudagraph_mode", CUDAGraphMode.PIECEWISE)
    with pytest.raises(CheckpointError, match=r"npu_grouped_matmul adds no bias to int4 products, .* --enforce-eager"):
        load(checkpoint("W4A4_DYNAMIC", with_biases), PREFIX, range(EXPERTS))


def test_a_broken_grouped_product_gives_way(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    break_grouped(monkeypatch, lambda dtype: dtype == torch.int32)
    directory = checkpoint("W4A4_FLATQUANT_DYNAMIC")
    scheme, layer = load(directory, PREFIX, range(EXPERTS))
    assert scheme.operator == "npu_kronecker_quant + npu_quant_matmul for each expert"
    assert "self check: npu_grouped_matmul raises RuntimeError: aclnnGroupedMatmulV5: EZ1001" in scheme.remark
    x, ids, weights = routed(20, HIDDEN, EXPERTS)
    expected = Experts(CheckpointReader(directory), PREFIX).formula(x, ids, weights)
    assert relative(through(scheme, layer, x, ids, weights), expected) < 0.15


def test_wrong_scales_are_found(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    operator = torch_npu.npu_grouped_matmul

    def call(x: Any, weight: Any, **kwargs: Any) -> Any:
        if kwargs.get("scale"):
            kwargs["scale"] = [kwargs["scale"][0].roll(1, 0)]  # of the expert before
        return operator(x, weight, **kwargs)

    monkeypatch.setattr(torch_npu, "npu_grouped_matmul", call)
    scheme, _ = load(checkpoint("W4A4_DYNAMIC"), PREFIX, range(EXPERTS))
    assert "self check: npu_grouped_matmul computes " in scheme.remark
    monkeypatch.setenv("VLLM_W4A4_SELF_CHECK", "0")
    assert load(checkpoint("W4A4_DYNAMIC"), PREFIX, range(EXPERTS))[0].remark == ""


def test_nothing_left(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    break_grouped(monkeypatch, lambda dtype: True)
    with pytest.raises(CheckpointError, match=f"layer {PREFIX}: self check: npu_grouped_matmul raises .*device-check"):
        load(checkpoint("W4A4_FLATQUANT_DYNAMIC"), PREFIX, range(EXPERTS))


def test_offsets_must_be_zero(checkpoint: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{PREFIX}.5.up_proj.weight_offset"] += 1.0

    with pytest.raises(CheckpointError, match=r"experts\.5\.up_proj\.weight_offset: expected zeros"):
        load(checkpoint("W4A4_DYNAMIC", change), PREFIX, range(EXPERTS))


def test_weights_are_loaded_again(checkpoint: Callable[..., Path]) -> None:
    scheme, layer = load(checkpoint("W4A4_FLATQUANT_DYNAMIC"), PREFIX, range(EXPERTS))
    addresses = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.settle()

    def change(tensors: Tensors) -> None:
        for name in (name for name in tensors if ".experts." in name):
            tensors[name] = tensors[name].flip(0).contiguous() if "clip" not in name else tensors[name] * 0.9

    directory = checkpoint("W4A4_FLATQUANT_DYNAMIC", change)
    reader = CheckpointReader(directory)
    fill(layer, reader, PREFIX, EXPERTS)
    scheme.process_weights_after_loading(layer)
    x, ids, weights = routed(8, HIDDEN, EXPERTS)
    expected = Experts(reader, PREFIX).with_roundings(x, ids, weights)
    assert relative(through(scheme, layer, x, ids, weights), expected) < 1e-3
    assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == addresses
    assert all(not parameter.missing() for parameter in layer.parameters())


def test_dummy_weights_compute(checkpoint: Callable[..., Path]) -> None:
    scheme, layer = load(checkpoint("W4A4_FLATQUANT_DYNAMIC"), PREFIX, range(EXPERTS))
    fill_with_plausible_values(layer)
    scheme.fill_dummy_scales(layer, TYPICAL_SCALE)
    y = through(scheme, layer, *routed(9, HIDDEN, EXPERTS)).float()
    assert y.isfinite().all()
    assert 0.01 < y.std() < 1000


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("enable_fused_mc2", 1, r"fused MC2 communication \(enable_fused_mc2\)"),
        ("multistream_overlap_gate", True, "multistream_overlap_gate"),
        ("mix_placement", True, "mix_placement"),
        ("dynamic_eplb", True, "load balancing of experts"),
        ("num_redundant_experts", 2, "load balancing of experts"),
    ],
)
def test_features_of_vllm_ascend_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, option: str, value: Any, named: str
) -> None:
    import vllm_ascend.ascend_config

    options = {"enable_fused_mc2": 0, "multistream_overlap_gate": False, "mix_placement": False}
    eplb = {"dynamic_eplb": False, "expert_map_path": None, "num_redundant_experts": 0}
    for group in (options, eplb):
        if option in group:
            group[option] = value
    asked = SimpleNamespace(eplb_config=SimpleNamespace(**eplb), **options)
    monkeypatch.setattr(vllm_ascend.ascend_config, "get_ascend_config", lambda: asked)
    experts = MagicMock(prefix=PREFIX, quant_type=QuantType.W4A4_DYNAMIC)
    method = AscendW4A4NpuExpertsMethod(MagicMock(tp_size=1), experts, MagicMock(), True)
    with pytest.raises(
        CheckpointError, match=f"layer {PREFIX}: experts of type W4A4_DYNAMIC do not run with .*{named}"
    ):
        method.create_weights(SimpleNamespace(), EXPERTS, HIDDEN, INTERMEDIATE, torch.bfloat16)


@pytest.mark.parametrize(
    ("moe", "hidden", "problem"),
    [
        ({}, 200, "expected 8 experts with 200 input and 96 intermediate features .* found 8 with 192 and 96"),
        ({"num_logical_experts": 9}, HIDDEN, "expected 9 experts with 192 input"),
        ({"activation": MoEActivation.GELU}, HIDDEN, "experts with the activation gelu cannot be run in W4A4_DYNAMIC"),
        ({"swiglu_limit": 7.0}, HIDDEN, "the activation silu with the limit 7.0 cannot be run"),
        ({"use_ep": True, "ep_size": 3}, HIDDEN, "ranks that divides the 8 experts, found 3"),
        ({"tp_size": 2}, HIDDEN, "split over 2 ranks, which are not the 1 of the .*Use --enable-expert-parallel"),
    ],
)
def test_models_that_are_refused(
    checkpoint: Callable[..., Path], moe: dict[str, Any], hidden: int, problem: str
) -> None:
    inventory = Inventory.of(CheckpointReader(checkpoint("W4A4_DYNAMIC")))
    usual = {
        "tp_size": 1, "num_logical_experts": EXPERTS, "activation": MoEActivation.SILU, "swiglu_limit": None,
        "use_ep": False, "ep_size": 1,
    }  # fmt: skip
    experts = plan_experts(PREFIX, inventory, backends=ON_NPU)
    method = AscendW4A4NpuExpertsMethod(SimpleNamespace(**usual | moe), experts, MagicMock(), True)
    with pytest.raises(CheckpointError, match=f"layer {PREFIX}: .*{problem}"):
        method.create_weights(SimpleNamespace(), EXPERTS, hidden, INTERMEDIATE // method.moe.tp_size, torch.bfloat16)


def test_the_device_check_knows_experts(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_model(checkpoint("W4A4_FLATQUANT_DYNAMIC"))
    assert plan.layers_on_rank(model, 1) == []
    todo = list(expert_steps(expert_layers(model, 1)))
    assert [step.kind for step in todo] == [
        "expert products", "expert products", "quantize", "expert transform", "expert activation"
    ]  # fmt: skip
    session = Session(torch.device("cpu"), torch.npu)
    assert [steps.execute(step, session).status for step in todo] == ["ok"] * 5
    swiglu = torch_npu.npu_swiglu
    monkeypatch.setattr(torch_npu, "npu_swiglu", lambda x: swiglu(x.roll(x.shape[-1] // 2, -1)))
    break_grouped(monkeypatch, lambda dtype: dtype != torch.int32)
    found = {step.kind: steps.execute(step, session) for step in todo}
    assert {kind for kind, outcome in found.items() if outcome.status != "ok"} == {
        "expert transform", "expert activation"
    }  # fmt: skip
    assert "activations wrongly" in found["expert activation"].message
