# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen3-MoE in vllm-ascend's real layers: W4A4 experts with our method, on the stand-in's operators."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from vllm.config import VllmConfig
from vllm.model_executor import parameter
from vllm.model_executor.model_loader import get_model

from tests.mixtures import EXPERTS, HIDDEN, INTERMEDIATE, PER_GROUP, write, write_mixture
from tests.npu.expert_layers import Experts, dispatcher, load, relative, routed
from tests.npu.micro import reload
from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.ops.npu.experts import Groups
from vllm_w4a4_plugin.quantization.ascend_experts import AscendW4A4NpuExpertsMethod
from vllm_w4a4_plugin.quantization.schemes import experts_npu, whole_tokens

KINDS = ("W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC", PER_GROUP)
FLATQUANT = 1
SAME_ROUNDINGS = 1e-3
"""Relative error between operators and reference that round at the same places: sums in another order."""


def prefix(layer: int) -> str:
    return f"model.layers.{layer}.mlp.experts"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixture")
    write_mixture(directory, KINDS)
    return directory


@pytest.fixture(scope="module")
def config(mixture: Path) -> "Iterator[VllmConfig]":
    from tests.npu.loading import distributed, engine_config, run_operators_on_cpu

    config = engine_config(mixture)
    with distributed(config):
        run_operators_on_cpu()
        yield config


@pytest.fixture(scope="module")
def model(config: VllmConfig) -> torch.nn.Module:
    return get_model(vllm_config=config)


def routed_experts(model: Any, layer: int) -> Any:
    experts = model.model.layers[layer].mlp.experts
    return getattr(experts, "routed_experts", experts)


def assert_experts_compute(config: VllmConfig, model: Any, directory: Path) -> None:
    """Through vllm-ascend's selection of experts, dispatcher and combination, which are its own."""
    from vllm_ascend.ascend_forward_context import set_ascend_forward_context

    reader = CheckpointReader(directory)
    for layer, kind in enumerate(KINDS):
        for tokens in (1, 30):
            x = routed(tokens, HIDDEN, EXPERTS)[0]
            gate = reader.load(f"model.layers.{layer}.mlp.gate.weight").to(torch.bfloat16)
            logits = x @ gate.T
            with set_ascend_forward_context(None, config, num_tokens=tokens):
                # Called directly: the operators of vLLM that wrap it are registered for NPUs.
                found = routed_experts(model, layer).forward_impl(hidden_states=x, router_logits=logits)
            weights, ids = logits.float().softmax(-1).topk(2)
            weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)
            expected = Experts(reader, prefix(layer)).with_roundings(x, ids, weights)
            assert relative(found, expected) < SAME_ROUNDINGS, (kind, tokens)


def test_the_experts_of_a_loaded_model(config: VllmConfig, model: Any, mixture: Path) -> None:
    assert_experts_compute(config, model, mixture)


def test_the_start_up_table_names_the_operators(model: Any) -> None:
    table = routed_experts(model, 0).quant_method.report.table()
    rows = {line.split("  ")[0]: line for line in table.splitlines()}
    assert "npu_dynamic_quant + npu_grouped_matmul" in rows["W4A4_DYNAMIC"]
    flatquant = rows["W4A4_FLATQUANT_DYNAMIC"]
    assert "npu_kronecker_quant + npu_grouped_matmul" in flatquant
    assert "clip_ratio below 0.933: int4 values stop at -7" in flatquant
    weights = EXPERTS * 3 * HIDDEN * INTERMEDIATE / 2 / 2**20
    assert f"{weights:.1f} MiB" in flatquant


@pytest.mark.parametrize("layer", range(len(KINDS)))
def test_the_float_formula_differs_by_int4_codes_that_fall_the_other_way(
    config: VllmConfig, mixture: Path, layer: int
) -> None:
    """Where the difference to the formula in float64 comes from: with the same codes, little of it is left."""
    experts = Experts(CheckpointReader(mixture), prefix(layer))
    x, ids, weights = routed(30, HIDDEN, EXPERTS)
    scheme, parameters = load(mixture, prefix(layer), range(EXPERTS))
    found = through(scheme, parameters, x, ids, weights)
    assert relative(found, experts.with_roundings(x, ids, weights)) < SAME_ROUNDINGS
    by_formula = relative(found, experts.formula(x, ids, weights))
    formula, codes = torch.cat(experts.compared, -1)
    cut_off = (formula == -8) & (codes == -7)  # npu_dynamic_quant never gives -8
    flipped = (formula != codes) & ~cut_off
    experts.use_codes = True
    with_codes = relative(found, experts.formula(x, ids, weights))
    print(
        f"{KINDS[layer]}: error {by_formula:.4f}, with the same codes {with_codes:.4f}; "
        f"{flipped.double().mean():.4%} of the codes flipped, {cut_off.double().mean():.4%} cut off"
    )
    assert with_codes < 6e-3
    assert with_codes < by_formula / 4
    assert (formula - codes).abs().max() <= 1
    assert flipped.double().mean() < 0.03
    assert layer == FLATQUANT or not cut_off.any()


def through(scheme: Any, parameters: Any, x: Any, ids: Any, weights: Any) -> torch.Tensor:
    """Experts that are all here, with tokens sorted and results added up by the test."""
    order = ids.flatten().sort(stable=True).indices
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
    rows = scheme.apply(parameters, x[order // 2].contiguous(), Groups.of(counts, 1, order.numel()))
    y = torch.zeros(x.shape[0] * 2, HIDDEN)
    y[order] = rows.float()
    return (y.view(-1, 2, HIDDEN) * weights.float()[..., None]).sum(1).to(torch.bfloat16)


class Exchange:
    """An all-gather among threads."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.parts, self.sizes = threading.Barrier(ranks), [None] * ranks, []
        self.local = threading.local()

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self.parts[self.local.rank] = x
        self.sizes.append(x.shape[-1])
        self.barrier.wait()
        whole = torch.cat(self.parts, -1)
        self.barrier.wait()
        return whole

    def run(self, rank: int, results: list[Any], *arguments: Any) -> None:
        self.local.rank = rank
        results[rank] = through(*arguments)


@pytest.mark.parametrize(("layer", "sent"), [(0, 1), (1, INTERMEDIATE // 2)])
def test_tensor_parallel_devices_add_up_to_one(
    config: VllmConfig, mixture: Path, monkeypatch: pytest.MonkeyPatch, layer: int, sent: int
) -> None:
    """Each has half of every expert's intermediate features; the input of down is quantized as one device does."""
    x, ids, weights = routed(20, HIDDEN, EXPERTS)
    exchange, results = Exchange(2), [None, None]
    for module in (experts_npu, whole_tokens):
        monkeypatch.setattr(module, "tensor_model_parallel_all_gather", exchange.gather)
    threads = []
    for rank in range(2):
        monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        scheme, parameters = load(mixture, prefix(layer), range(EXPERTS), (2, rank))
        assert parameters.w13_weight.shape == (EXPERTS, HIDDEN, INTERMEDIATE // 8)
        assert parameters.w2_weight.shape == (EXPERTS, INTERMEDIATE // 2, HIDDEN // 8)
        assert scheme.sent_bytes == 2 * (4 if layer == 0 else INTERMEDIATE)
        arguments = (rank, results, scheme, parameters, x, ids, weights)
        threads.append(threading.Thread(target=exchange.run, args=arguments))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exchange.sizes == [sent] * 2
    expected = Experts(CheckpointReader(mixture), prefix(layer)).with_roundings(x, ids, weights)
    # The sum of two halves, each rounded to float16 and bfloat16.
    assert relative(sum(part.float() for part in results), expected) < 5e-3


@pytest.mark.parametrize("tokens", [1, 20])
def test_expert_parallel_devices_add_up_to_one(
    config: VllmConfig, mixture: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """vllm-ascend's dispatcher sends each device the rows of its experts; of one token, it may have none."""
    from vllm_ascend.ops.fused_moe import token_dispatcher

    from vllm_w4a4_plugin.quantization import ascend_dispatch

    x, ids, weights = routed(tokens, HIDDEN, EXPERTS)
    total = torch.zeros(x.shape)
    for rank in range(4):
        here = range(2 * rank, 2 * rank + 2)
        method = AscendW4A4NpuExpertsMethod(MagicMock(), MagicMock(), MagicMock(), True)
        method.scheme, layer = load(mixture, prefix(1), here)
        layer.apply_router_weight_on_input = False
        sends = token_dispatcher.TokenDispatcherWithAllGather(top_k=2, num_experts=EXPERTS, num_local_experts=2)
        group = MagicMock(rank_in_group=rank)
        monkeypatch.setattr(token_dispatcher, "get_ep_group", lambda group=group: group)
        communication = dispatcher(sends.token_dispatch, sends.token_combine)
        monkeypatch.setattr(ascend_dispatch, "communication", lambda communication=communication: communication)
        places = torch.full((EXPERTS,), -1)
        places[list(here)] = torch.arange(2)
        total += method.apply(layer, x, weights, ids, expert_map=places, mc2_mask=None).routed_out.float()
    expected = Experts(CheckpointReader(mixture), prefix(1)).with_roundings(x, ids, weights)
    assert relative(total, expected) < 5e-3


def test_running_totals_and_spare_rows(config: VllmConfig, mixture: Path) -> None:
    """MC2's dispatcher counts so, and pads; rows of no expert do not matter."""
    scheme, layer = load(mixture, prefix(1), range(EXPERTS))
    rows = routed(12, HIDDEN, EXPERTS)[0]
    counts = torch.tensor([3, 0, 2, 0, 0, 4, 0, 1])
    expected = scheme.apply(layer, rows[:10], Groups.of(counts, 1, 10))
    rows[10:] = float("nan")
    groups = Groups.of(counts.cumsum(0), 0, 12)
    found = scheme.apply(layer, rows, groups)
    assert torch.equal(found[:10], expected)
    assert groups.clear_rest(found)[10:].eq(0).all()
    assert scheme.apply(layer, rows[:0], Groups.of(torch.zeros(8, dtype=torch.int64), 1, 0)).shape == (0, HIDDEN)


def test_a_loaded_model_takes_other_weights(config: VllmConfig, model: Any, mixture: Path, tmp_path: Path) -> None:
    """Those of the experts in reverse order, with other clip ratios, by what vLLM does for `reload_weights`."""
    reader = CheckpointReader(mixture)
    other = {}
    for name in reader.tensors:
        head, found, rest = name.partition(".experts.")
        number, _, suffix = rest.partition(".")
        renamed = f"{head}.experts.{EXPERTS - 1 - int(number)}.{suffix}" if found else name
        other[renamed] = reader.load(name) * (0.9 if name.endswith("clip_ratio") else 1)
    write(tmp_path, other, dict(reader.description.tensors))
    (tmp_path / "config.json").write_text((mixture / "config.json").read_text())
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    reload(model, config, tmp_path)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert_experts_compute(config, model, tmp_path)
