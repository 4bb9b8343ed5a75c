# SPDX-License-Identifier: Apache-2.0
"""The operator for the experts of a layer against the reference. `test_instruction_sets.py` runs this file for every
instruction set.

The reference rounds its own activations, and an int4 activation that falls the other way changes the outputs of its
token visibly. So outputs are compared token by token: nearly all must agree to rounding, none may be far away.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from vllm_w4a4_plugin import ops
from vllm_w4a4_plugin.ops import reference

HIDDEN, INTERMEDIATE, EXPERTS = 192, 80, 8


@dataclass
class Experts:
    """Random experts with everything that they may have."""

    groups: int = 1
    has_transform: bool = False
    shares_down: bool = False
    is_int8: bool = False
    is_wide: bool = False
    hidden: int = HIDDEN
    intermediate: int = INTERMEDIATE
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.groups + self.hidden)
        low, high = (-128, 128) if self.is_int8 else (-8, 8)
        sizes = {"w13": (2 * self.intermediate, self.hidden), "w2": (self.hidden, self.intermediate)}
        self.weights = {
            name: torch.randint(low, high, (EXPERTS, *size), dtype=torch.int8, generator=self.generator)
            for name, size in sizes.items()
        }
        shape = ops.packed_int8_shape if self.is_int8 else ops.packed_int4_shape
        for name, weight in self.weights.items():
            packed = torch.zeros(EXPERTS, *shape(*sizes[name]), dtype=torch.int8)
            for expert in range(EXPERTS):
                (ops.pack_int8_rows_ if self.is_int8 else ops.pack_int4_rows_)(packed[expert], weight[expert], 0)
            self.arguments[f"{name}_packed"] = packed
            scales = (EXPERTS, sizes[name][0]) + ((self.groups,) if self.groups > 1 else ())
            self.arguments[f"{name}_scale"] = torch.rand(scales, generator=self.generator) * 0.01 + 1e-3
        if self.is_wide:
            self.arguments["activation_bits"] = 8
        if self.has_transform:
            self.arguments |= self.transform("w13", 12, 16, ()) | self.transform("w2", 8, 10, self.down_shape)

    @property
    def down_shape(self) -> tuple[int, ...]:
        return () if self.shares_down else (EXPERTS,)

    def transform(self, name: str, left: int, right: int, shape: tuple[int, ...]) -> dict[str, Any]:
        clips = torch.rand(shape or (1,), generator=self.generator) * 0.3 + 0.7
        return {
            f"{name}_left_trans": torch.randn(*shape, left, left, generator=self.generator) / left**0.5,
            f"{name}_right_trans": torch.randn(*shape, right, right, generator=self.generator) / right**0.5,
            f"{name}_clip_ratio": clips,
        }

    def with_offsets_and_biases(self) -> "Experts":
        for name, size in (("w13", 2 * self.intermediate), ("w2", self.hidden)):
            scale = self.arguments[f"{name}_scale"]
            self.arguments[f"{name}_offset"] = torch.randn(scale.shape, generator=self.generator) * 0.5
            self.arguments[f"{name}_bias"] = torch.randn(EXPERTS, size, generator=self.generator) * 0.1
        return self

    def linear(self, name: str, x: torch.Tensor, expert: int) -> torch.Tensor:
        """One expert's product by the formula of a linear layer."""

        def part(key: str) -> Any:
            value = self.arguments.get(f"{name}_{key}")
            per_expert = {"left_trans": 3, "right_trans": 3, "clip_ratio": 1}
            if value is None or (key in per_expert and (value.dim() != per_expert[key] or value.shape[0] == 1)):
                return value
            return value[expert]

        weight, scale = self.weights[name][expert], part("scale")
        if self.is_int8:
            return reference.w8a8_linear(x, weight, scale, part("bias"))
        clip = part("clip_ratio")
        return reference.flatquant_linear(
            x, weight, scale, part("left_trans"), part("right_trans"), 1.0 if clip is None else float(clip),
            part("bias"), weight_offset=part("offset"), activation_bits=8 if self.is_wide else 4,
        )  # fmt: skip

    def tokens(self, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(count, self.hidden, generator=self.generator).to(dtype)

    def routing(self, tokens: int, top_k: int, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.rand(tokens, experts, generator=self.generator)
        weights, ids = scores.softmax(-1).topk(top_k)
        return weights, ids.to(torch.int32)

    def run(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, **more: Any) -> torch.Tensor:
        arguments = {**self.arguments, **more}
        packed = [arguments.pop(name) for name in ("w13_packed", "w13_scale", "w2_packed", "w2_scale")]
        return ops.experts_mlp(x, weights, ids, *packed, **arguments)

    def expected(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return reference.experts_mlp(
            x, weights, ids, lambda t, e: self.linear("w13", t, e), lambda t, e: self.linear("w2", t, e)
        )


def check(experts: Experts, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
    found, expected = experts.run(x, weights, ids), experts.expected(x, weights, ids)
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[x.dtype]
    errors = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-6)
    flipped = errors > rounding
    assert flipped.float().mean() <= 0.1 or flipped.sum() <= 1
    assert errors.max() < 0.1


KINDS = {
    "per channel": {},
    "per group": {"groups": 2},
    "flatquant": {"has_transform": True},
    "flatquant, one down transform": {"has_transform": True, "shares_down": True},
    "int8": {"is_int8": True},
    "8-bit activations": {"is_wide": True, "has_transform": True},
    "8-bit activations, per group": {"is_wide": True, "groups": 2},
}
BATCHES = {1: (1, 5, 300), 2: (2, 13, 300), 3: (64,), 4: (16,), 5: (31,), 6: (99,), 7: (9,), 8: (1, 300)}  # by top_k


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_k", "batches"), BATCHES.items())
def test_against_the_reference(kind: str, top_k: int, batches: tuple[int, ...]) -> None:
    for experts, tokens in ((Experts(**KINDS[kind]), tokens) for tokens in batches):  # type: ignore[arg-type]
        check(experts, experts.tokens(tokens), *experts.routing(tokens, top_k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    experts = Experts(**KINDS[kind])  # type: ignore[arg-type]
    check(experts, experts.tokens(20, dtype), *experts.routing(20, 3))


@pytest.mark.parametrize("kind", ["per channel", "per group", "flatquant", "8-bit activations, per group"])
def test_offsets_and_biases(kind: str) -> None:
    experts = Experts(**KINDS[kind]).with_offsets_and_biases()  # type: ignore[arg-type]
    for tokens in (1, 30):
        check(experts, experts.tokens(tokens), *experts.routing(tokens, 4))


def test_experts_without_tokens_and_one_with_all() -> None:
    experts = Experts(has_transform=True)
    x, weights = experts.tokens(280), torch.rand(280, 1)
    check(experts, x, weights, torch.full((280, 1), 5))


def test_sizes_that_fill_no_tile() -> None:
    experts = Experts(hidden=75, intermediate=21)
    check(experts, experts.tokens(17), *experts.routing(17, 3))


def test_more_pairs_than_are_computed_at_once() -> None:
    experts = Experts(hidden=16, intermediate=8)
    tokens = 1100
    x, (weights, ids) = experts.tokens(tokens), experts.routing(tokens, 8)
    whole = experts.run(x, weights, ids)
    for part in (slice(0, 40), slice(500, 530), slice(1060, tokens)):
        assert torch.equal(experts.run(x[part], weights[part], ids[part]), whole[part])


def test_a_token_has_the_same_output_in_any_batch() -> None:
    experts = Experts(has_transform=True)
    x, (weights, ids) = experts.tokens(50), experts.routing(50, 4)
    whole = experts.run(x, weights, ids)
    for token in (0, 17, 49):
        one = slice(token, token + 1)
        assert torch.equal(experts.run(x[one], weights[one], ids[one]), whole[one])


def test_ids_of_either_width() -> None:
    experts = Experts()
    x, (weights, ids) = experts.tokens(9), experts.routing(9, 2)
    assert torch.equal(experts.run(x, weights, ids.long()), experts.run(x, weights, ids))


def test_experts_of_other_ranks_add_nothing() -> None:
    """The parts of two ranks with half of the experts each add up to the whole."""
    experts = Experts(has_transform=True)
    x, (weights, ids) = experts.tokens(40), experts.routing(40, 3)
    total = torch.zeros_like(x)
    for half in (slice(0, 4), slice(4, 8)):
        place = torch.full((EXPERTS,), -1, dtype=torch.int32)
        place[half] = torch.arange(4, dtype=torch.int32)
        mine = {
            name: value if name.startswith("w13_") and value.shape[0] != EXPERTS else value[half]
            for name, value in experts.arguments.items()
        }
        total += experts.run(x, weights, ids, **mine, expert_map=place)
    torch.testing.assert_close(total, experts.run(x, weights, ids), rtol=1e-5, atol=1e-5)


def test_a_token_without_experts_is_zero() -> None:
    experts = Experts().with_offsets_and_biases()
    x, (weights, ids) = experts.tokens(5), experts.routing(5, 2)
    ids[2] = -1
    y = experts.run(x, weights, ids)
    assert not y[2].any()
    kept = [0, 1, 3, 4]
    assert torch.equal(y[kept], experts.run(x[kept], weights[kept], ids[kept]))


def test_empty_batch() -> None:
    experts = Experts(has_transform=True)
    assert experts.run(experts.tokens(0), *experts.routing(0, 2)).shape == (0, HIDDEN)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_not_finite_stays_in_its_token(kind: str, value: float) -> None:
    experts = Experts(**KINDS[kind])  # type: ignore[arg-type]
    x, (weights, ids) = experts.tokens(30), experts.routing(30, 3)
    good = experts.run(x, weights, ids)
    x[7, 100] = value
    y = experts.run(x, weights, ids)
    assert y[7].isnan().all()
    others = [token for token in range(30) if token != 7]
    assert torch.equal(y[others], good[others])


def test_intermediate_values_beyond_float32_make_their_token_nan() -> None:
    experts = Experts()
    x, (weights, ids) = experts.tokens(6), experts.routing(6, 1)
    good = experts.run(x, weights, ids)
    x[2] *= 1e30
    y = experts.run(x, weights, ids)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3, 4, 5]], good[[0, 1, 3, 4, 5]])


def test_zeros_give_what_the_biases_give() -> None:
    experts = Experts(has_transform=True).with_offsets_and_biases()
    x, (weights, ids) = experts.tokens(4), experts.routing(4, 2)
    x[1] = 0
    check(experts, x, weights, ids)


def test_fake_implementation() -> None:
    experts = Experts(has_transform=True).with_offsets_and_biases()
    x, (weights, ids) = experts.tokens(6), experts.routing(6, 2)
    order = ("w13_packed", "w13_scale", "w2_packed", "w2_scale", "w13_offset", "w2_offset", "w13_bias", "w2_bias",
             "w13_left_trans", "w13_right_trans", "w13_clip_ratio", "w2_left_trans", "w2_right_trans",
             "w2_clip_ratio", "expert_map")  # fmt: skip
    arguments = [experts.arguments.get(name) for name in order]
    torch.library.opcheck(torch.ops.vllm_w4a4.experts_mlp.default, (x, weights, ids, *arguments))
    torch.library.opcheck(torch.ops.vllm_w4a4.experts_mlp.default, (x.bfloat16(), weights, ids, *arguments, 4, True))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("w13_packed", torch.zeros(EXPERTS, 3, 4, 64, dtype=torch.int8), "w13_packed: expected int8 or uint8"),
        ("w13_scale", torch.ones(EXPERTS), r"w13_scale: expected \[experts, out\]"),
        ("w2_scale", torch.ones(EXPERTS, 7), "w2_packed: expected"),
        ("w2_bias", torch.ones(3), "w2_bias: expected 1536 values"),
        ("w2_offset", torch.ones(3), "w2_offset: expected 1536 values"),
        ("w13_left_trans", torch.eye(5), "sizes 5 x 38 do not multiply to the 192 input features"),
        ("w2_left_trans", torch.ones(3, 8, 8), "w2_left_trans: expected one matrix or one for each of 8 experts"),
        ("w13_clip_ratio", torch.tensor([0.0]), r"w13_clip_ratio: expected values in \(0, 1\]"),
        ("w2_clip_ratio", torch.ones(3), "w2_clip_ratio: expected one value or one for each of 8 experts"),
        ("activation_bits", 6, "activation_bits: expected 4 or 8, found 6"),
        ("expert_map", torch.full((EXPERTS,), 8, dtype=torch.int32), "expert_map: expected places of the 8 experts"),
    ],
)
def test_wrong_arguments_are_named(name: str, value: torch.Tensor | int, message: str) -> None:
    experts = Experts()
    with pytest.raises(RuntimeError, match=message):
        experts.run(experts.tokens(2), *experts.routing(2, 2), **{name: value})


@pytest.mark.parametrize("bad", [EXPERTS, -2])
def test_ids_of_no_expert_are_refused(bad: int) -> None:
    experts = Experts()
    weights, ids = experts.routing(3, 2)
    ids[1, 1] = bad
    with pytest.raises(RuntimeError, match=rf"topk_ids: expected ids in \[-1, 8\), found {bad}"):
        experts.run(experts.tokens(3), weights, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_of_ranks_round_as_one_rank_does(dtype: torch.dtype) -> None:
    experts = Experts(has_transform=True)
    x, (weights, ids) = experts.tokens(50, dtype), experts.routing(50, 4)
    parts = [experts.run(x, weights, torch.where(ids % 2 == rank, ids, -1), is_double=True) for rank in range(2)]
    assert [part.dtype for part in parts] == [torch.float64] * 2
    assert torch.equal((parts[0] + parts[1]).float().to(dtype), experts.run(x, weights, ids))
