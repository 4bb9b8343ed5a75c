# SPDX-License-Identifier: Apache-2.0
"""vLLM's real linear layers with our method, loaded tensor by tensor at tensor-parallel rank 0 and 1 of 2.

The oracle is the reference on the whole, unpacked weights; rank r must give its part of it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from vllm_w4a4_plugin.checkpoint import CheckpointError
from vllm_w4a4_plugin.ops import reference
from vllm_w4a4_plugin.quantization.config import AscendW4A4Config
from vllm_w4a4_plugin.quantization.schemes import w4a4_flatquant_dynamic

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LEFT, RIGHT = 12, 16
IN = LEFT * RIGHT


class Linear:
    """One linear of a made-up checkpoint and what it computes."""

    def __init__(
        self, out: int, kind: str, seed: int, groups: int = 1, offset: bool = False, bias: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        shared = torch.Generator().manual_seed(99)
        low, high = (-8, 8) if "W4A4" in kind else (-127, 128)
        self.kind = kind
        self.weight = torch.randint(low, high, (out, IN), dtype=torch.int8, generator=generator)
        self.weight_scale = torch.rand(out, groups, generator=generator) * 0.02
        self.weight_offset = torch.randn(out, groups, generator=generator) if offset else torch.zeros(out, groups)
        self.left_trans = torch.randn(LEFT, LEFT, generator=shared) / LEFT**0.5
        self.right_trans = torch.randn(RIGHT, RIGHT, generator=shared) / RIGHT**0.5
        self.clip_ratio = torch.tensor([0.93])
        self.bias = torch.randn(out, generator=generator) if bias else None

    def tensors(self) -> dict[str, torch.Tensor]:
        names = ["weight", "weight_scale", "weight_offset"]
        if self.kind == "W4A4_FLATQUANT_DYNAMIC":
            names += ["left_trans", "right_trans", "clip_ratio"]
        names += ["bias"] if self.bias is not None else []
        return {name: getattr(self, name) for name in names}

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight_scale.squeeze(1)
        if self.kind == "W8A8_DYNAMIC":
            return reference.w8a8_linear(x, self.weight, scale, self.bias)
        flat = self.kind == "W4A4_FLATQUANT_DYNAMIC"
        return reference.flatquant_linear(
            x,
            self.weight,
            scale,
            self.left_trans if flat else None,
            self.right_trans if flat else None,
            self.clip_ratio.item() if flat else 1.0,
            self.bias,
            weight_offset=self.weight_offset.squeeze(1),
        )


@pytest.fixture(autouse=True)
def vllm_context() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., AscendW4A4Config]:
    """Write the linears as a checkpoint directory and open it as vLLM does."""

    def make(**linears: Linear) -> AscendW4A4Config:
        import json

        tensors, kinds = {}, {}
        for name, linear in linears.items():
            for suffix, tensor in linear.tensors().items():
                tensors[f"m.{name}.{suffix}"] = tensor
                kinds[f"m.{name}.{suffix}"] = "FLOAT" if suffix == "bias" else linear.kind
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "quant_model_description.json").write_text(json.dumps({"version": "1.0.0", **kinds}))
        config = AscendW4A4Config()
        config.maybe_update_config(str(tmp_path))
        config.packed_modules_mapping = PACKED
        return config

    return make


@pytest.fixture
def at_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend to be a rank of a tensor-parallel group."""

    def pretend(rank: int, size: int) -> None:
        from vllm.model_executor import parameter

        for module in (vllm_linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        from vllm_w4a4_plugin.quantization import report

        monkeypatch.setattr(report, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(vllm_linear, "tensor_model_parallel_all_reduce", lambda x: x)

    pretend(0, 1)
    return pretend


def load(layer: Any, linears: dict[Any, Linear]) -> None:
    """What a model's load_weights does, then what vLLM's loader does after it."""
    for shard, linear in linears.items():
        for name, tensor in linear.tensors().items():
            parameter = getattr(layer, name)
            if shard is None:
                parameter.weight_loader(parameter, tensor)
            else:
                parameter.weight_loader(parameter, tensor, shard)
    layer.quant_method.process_weights_after_loading(layer)


def assert_near(y: torch.Tensor, expected: torch.Tensor) -> None:
    assert y.shape == expected.shape
    assert ((y - expected).norm() / expected.norm()).item() < 2e-3  # a flipped 4-bit rounding now and then


def inputs(tokens: int = 9) -> torch.Tensor:
    return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(5))


KINDS = ["W4A4_FLATQUANT_DYNAMIC", "W4A4_DYNAMIC", "W8A8_DYNAMIC"]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_qkv(make_config: Any, at_rank: Any, kind: str, size: int, bias: bool) -> None:
    head, heads, kv_heads = 16, 4, 2
    q, k, v = (Linear(n * head, kind, i, bias=bias) for i, n in enumerate((heads, kv_heads, kv_heads)))
    config = make_config(q_proj=q, k_proj=k, v_proj=v)
    for rank in range(size):
        at_rank(rank, size)
        layer = QKVParallelLinear(
            IN, head, heads, kv_heads, bias=bias, params_dtype=torch.float32, quant_config=config, prefix="m.qkv_proj"
        )
        load(layer, {"q": q, "k": k, "v": v})
        y, _ = layer(inputs())
        parts = [linear.expected(inputs()).chunk(size, -1)[rank] for linear in (q, k, v)]
        assert_near(y, torch.cat(parts, -1))


def test_key_value_heads_are_replicated_when_there_are_fewer_than_ranks(make_config: Any, at_rank: Any) -> None:
    head, kind = 16, "W4A4_FLATQUANT_DYNAMIC"
    q, k, v = Linear(4 * head, kind, 0), Linear(head, kind, 1), Linear(head, kind, 2)
    config = make_config(q_proj=q, k_proj=k, v_proj=v)
    for rank in range(2):
        at_rank(rank, 2)
        layer = QKVParallelLinear(
            IN, head, 4, 1, bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.qkv_proj"
        )
        load(layer, {"q": q, "k": k, "v": v})
        parts = [q.expected(inputs()).chunk(2, -1)[rank], k.expected(inputs()), v.expected(inputs())]
        assert_near(layer(inputs())[0], torch.cat(parts, -1))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", [64, 40, 14])
def test_merged(make_config: Any, at_rank: Any, kind: str, size: int, out: int) -> None:
    """Sizes 40 and 14 put shard borders inside the kernels' tiles of 16 rows."""
    gate, up = Linear(out, kind, 0), Linear(out, kind, 1)
    config = make_config(gate_proj=gate, up_proj=up)
    for rank in range(size):
        at_rank(rank, size)
        layer = MergedColumnParallelLinear(
            IN, [out, out], bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.gate_up_proj"
        )
        load(layer, {0: gate, 1: up})
        parts = [linear.expected(inputs()).chunk(size, -1)[rank] for linear in (gate, up)]
        assert_near(layer(inputs())[0], torch.cat(parts, -1))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_column_with_groups_and_offsets(make_config: Any, at_rank: Any, groups: int, offset: bool, size: int) -> None:
    linear = Linear(48, "W4A4_DYNAMIC", 0, groups=groups, offset=offset)
    config = make_config(proj=linear)
    for rank in range(size):
        at_rank(rank, size)
        layer = ColumnParallelLinear(
            IN, 48, bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.proj"
        )
        load(layer, {None: linear})
        assert_near(layer(inputs())[0], linear.expected(inputs()).chunk(size, -1)[rank])


@pytest.mark.parametrize("bias", [False, True])
def test_replicated(make_config: Any, at_rank: Any, bias: bool) -> None:
    linear = Linear(40, "W4A4_FLATQUANT_DYNAMIC", 0, bias=bias)
    config = make_config(proj=linear)
    for rank, size in ((0, 1), (1, 2)):
        at_rank(rank, size)
        layer = ReplicatedLinear(IN, 40, bias=bias, params_dtype=torch.float32, quant_config=config, prefix="m.proj")
        load(layer, {None: linear})
        assert_near(layer(inputs())[0], linear.expected(inputs()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_row_parallel_flatquant(
    make_config: Any, at_rank: Any, monkeypatch: pytest.MonkeyPatch, size: int, bias: bool
) -> None:
    """The ranks' outputs add up to the whole layer's, with the same int4 values as on one rank; bias counts once."""
    linear = Linear(40, "W4A4_FLATQUANT_DYNAMIC", 0, bias=bias)
    config = make_config(proj=linear)
    monkeypatch.setattr(w4a4_flatquant_dynamic, "tensor_model_parallel_all_gather", lambda x: inputs())
    total = torch.zeros(9, 40)
    for rank in range(size):
        at_rank(rank, size)
        layer = RowParallelLinear(
            IN, 40, bias=bias, params_dtype=torch.float32, quant_config=config, prefix="m.proj", input_is_parallel=True
        )
        load(layer, {None: linear})
        total += layer(inputs().chunk(size, -1)[rank].contiguous())[0]
    assert_near(total, linear.expected(inputs()))


@pytest.mark.parametrize("groups", [1, 2])
def test_row_parallel_dynamic_quantizes_each_ranks_part(make_config: Any, at_rank: Any, groups: int) -> None:
    linear = Linear(40, "W4A4_DYNAMIC", 0, groups=groups)
    config = make_config(proj=linear)
    half = IN // 2
    for rank in range(2):
        at_rank(rank, 2)
        layer = RowParallelLinear(IN, 40, bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.proj")
        load(layer, {None: linear})
        x = inputs()[:, rank * half : (rank + 1) * half].contiguous()
        scale = linear.weight_scale[:, rank : rank + 1] if groups == 2 else linear.weight_scale
        expected = reference.flatquant_linear(
            x, linear.weight[:, rank * half : (rank + 1) * half], scale.squeeze(1), None, None
        )
        assert_near(layer.quant_method.apply(layer, x), expected)


def test_groups_that_ranks_would_cut_are_refused(make_config: Any, at_rank: Any) -> None:
    config = make_config(proj=Linear(40, "W4A4_DYNAMIC", 0, groups=3))
    at_rank(0, 2)
    with pytest.raises(CheckpointError, match=r"m\.proj: 96 .* group size 64.*tensor-parallel-size"):
        RowParallelLinear(IN, 40, bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.proj")


def test_int4_weights_stay_half_a_byte(make_config: Any, at_rank: Any) -> None:
    config = make_config(proj=Linear(48, "W4A4_FLATQUANT_DYNAMIC", 0))
    layer = ColumnParallelLinear(IN, 48, bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.proj")
    assert layer.weight.numel() * layer.weight.element_size() == 48 * IN // 2


def test_loading_again_replaces_everything(make_config: Any, at_rank: Any) -> None:
    first, second = (Linear(40, "W4A4_FLATQUANT_DYNAMIC", i, offset=bool(i)) for i in range(2))
    second.clip_ratio = torch.tensor([0.7])
    config = make_config(proj=first)
    layer = ColumnParallelLinear(IN, 40, bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.proj")
    for linear in (first, second, first):
        load(layer, {None: linear})
        assert_near(layer(inputs())[0], linear.expected(inputs()))


def test_clips_that_differ_by_rounding_are_averaged(make_config: Any, at_rank: Any) -> None:
    gate, up = Linear(16, KINDS[0], 0), Linear(16, KINDS[0], 1)
    gate.clip_ratio, up.clip_ratio = torch.tensor([0.9300]), torch.tensor([0.9302])
    config = make_config(gate_proj=gate, up_proj=up)
    layer = MergedColumnParallelLinear(
        IN, [16, 16], bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.gate_up_proj"
    )
    load(layer, {0: gate, 1: up})
    assert layer.clip_ratio.tolist() == pytest.approx([0.9301, 0.9301], abs=1e-6)


def merged_pair(make_config: Any) -> tuple[Any, Linear, Linear]:
    gate, up = Linear(16, KINDS[0], 0), Linear(16, KINDS[0], 1)
    config = make_config(gate_proj=gate, up_proj=up)
    layer = MergedColumnParallelLinear(
        IN, [16, 16], bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.gate_up_proj"
    )
    return layer, gate, up


def test_transforms_of_fused_shards_must_be_equal(make_config: Any, at_rank: Any) -> None:
    layer, gate, up = merged_pair(make_config)
    up.right_trans = up.right_trans.clone()
    up.right_trans[3, 4] += 1e-6
    with pytest.raises(
        CheckpointError, match=r"m\.gate_up_proj, tensor m\.up_proj\.right_trans: .*m\.gate_proj\.right_trans"
    ):
        load(layer, {0: gate, 1: up})


def test_clips_of_fused_shards_must_be_near(make_config: Any, at_rank: Any) -> None:
    layer, gate, up = merged_pair(make_config)
    up.clip_ratio = torch.tensor([0.95])
    with pytest.raises(CheckpointError, match=r"m\.gate_up_proj: .*m\.up_proj\.clip_ratio: 0\.95"):
        load(layer, {0: gate, 1: up})


@pytest.mark.parametrize("missing", ["weight", "weight_scale", "left_trans", "clip_ratio"])
def test_a_parameter_that_no_tensor_filled_is_an_error(make_config: Any, at_rank: Any, missing: str) -> None:
    layer, gate, up = merged_pair(make_config)
    incomplete = {name: tensor for name, tensor in up.tensors().items() if name != missing}
    up.tensors = lambda: incomplete  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=rf"m\.gate_up_proj: .*{missing}.*m\.up_proj\.{missing}"):
        load(layer, {0: gate, 1: up})


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("weight", torch.full((16, IN), 8, dtype=torch.int8), "expected int4 values in"),
        ("weight", torch.zeros(16, IN), "expected int8, found torch.float32"),
        ("weight", torch.zeros(16, IN + 8, dtype=torch.int8), "expected 192 columns"),
        ("weight", torch.zeros(15, IN, dtype=torch.int8), "expected 16 rows"),
        ("weight_scale", torch.full((16, 1), float("nan")), "expected finite values"),
        ("left_trans", torch.zeros(LEFT + 1, LEFT + 1), r"expected shape \[12, 12\], found \[13, 13\]"),
        ("clip_ratio", torch.tensor([1.5]), r"expected a clip ratio in \(0, 1\], found 1.5"),
    ],
)
def test_bad_tensors_are_refused_as_they_arrive(
    make_config: Any, at_rank: Any, name: str, tensor: torch.Tensor, words: str
) -> None:
    layer, _, _ = merged_pair(make_config)
    parameter = getattr(layer, name)
    with pytest.raises(
        CheckpointError, match=rf"model.safetensors: layer m\.gate_up_proj, tensor m\.up_proj\.{name}: {words}"
    ):
        parameter.weight_loader(parameter, tensor, 1)


def test_asymmetric_int8_weights_are_refused(make_config: Any, at_rank: Any) -> None:
    linear = Linear(16, "W8A8_DYNAMIC", 0, offset=True)
    config = make_config(proj=linear)
    layer = ColumnParallelLinear(IN, 16, bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.proj")
    with pytest.raises(CheckpointError, match=r"m\.proj\.weight_offset: expected zeros"):
        load(layer, {None: linear})


@pytest.mark.parametrize("in_checkpoint", [True, False])
def test_a_bias_on_one_side_only_is_an_error(make_config: Any, at_rank: Any, in_checkpoint: bool) -> None:
    linear = Linear(16, "W4A4_DYNAMIC", 0, bias=in_checkpoint)
    config = make_config(proj=linear)
    layer = ColumnParallelLinear(
        IN, 16, bias=not in_checkpoint, params_dtype=torch.float32, quant_config=config, prefix="m.proj"
    )
    linear.bias = None
    with pytest.raises(CheckpointError, match=r"m\.proj\.bias: checkpoint has"):
        load(layer, {None: linear})


def test_input_size_must_fit_the_model(make_config: Any, at_rank: Any) -> None:
    config = make_config(proj=Linear(16, "W4A4_DYNAMIC", 0))
    with pytest.raises(
        CheckpointError, match=r"m\.proj\.weight: expected 256 input features \(config\.json\), found 192"
    ):
        ColumnParallelLinear(256, 16, bias=False, params_dtype=torch.float32, quant_config=config, prefix="m.proj")


def test_the_table_is_logged_once_all_layers_are_ready(
    make_config: Any, at_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_w4a4_plugin.quantization import report

    logged: list[str] = []
    monkeypatch.setattr(report.logger, "info", lambda text, *args: logged.append(text % args))
    layer, gate, up = merged_pair(make_config)
    load(layer, {0: gate, 1: up})
    load(layer, {0: gate, 1: up})
    assert len(logged) == 1
    assert "W4A4_FLATQUANT_DYNAMIC" in logged[0]
    assert "vllm_w4a4::flatquant_linear" in logged[0]


def test_vllms_layerwise_reload(make_config: Any, at_rank: Any) -> None:
    """vLLM's own machinery: counts elements on the meta device, loads a layer when all its tensors have come."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    layer, gate, up = merged_pair(make_config)
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    load(layer, {0: gate, 1: up})
    storage = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}

    def reload(linears: dict[int, Linear], leave_out: str = "") -> None:
        initialize_layerwise_reload(model)
        for shard, linear in linears.items():
            for name, tensor in linear.tensors().items():
                if f"{shard}.{name}" != leave_out:
                    parameter = getattr(layer, name)
                    parameter.weight_loader(parameter, tensor, shard)
        finalize_layerwise_reload(model, None)

    other = {0: Linear(16, KINDS[0], 7), 1: Linear(16, KINDS[0], 8)}
    for linear in other.values():
        linear.left_trans, linear.clip_ratio = gate.left_trans.flip(0).contiguous(), torch.tensor([0.8])
    for linears in (other, {0: gate, 1: up}):
        reload(linears)
        assert_near(layer(inputs())[0], torch.cat([linears[i].expected(inputs()) for i in range(2)], -1))
    # A compiled graph keeps the storage it was compiled with.
    assert storage == {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    with pytest.raises(CheckpointError, match=r"m\.up_proj\.clip_ratio"):
        reload(other, leave_out="1.clip_ratio")
