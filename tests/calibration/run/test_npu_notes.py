# SPDX-License-Identifier: Apache-2.0
"""What is said about NPUs is what the loader's kernel choice says."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_w4a4_plugin.calibration.model.structure import Role, group_sizes
from vllm_w4a4_plugin.calibration.recipe import RECIPES
from vllm_w4a4_plugin.calibration.run.npu_notes import npu_notes
from vllm_w4a4_plugin.calibration.transforms.sizes import stored_factors
from vllm_w4a4_plugin.checkpoint.types import NPU, VLLM_ASCEND, QuantType
from vllm_w4a4_plugin.ops.npu.select import Kernel, RankShape, select_kernel


def config(hidden: int, mlp: int, head: int) -> Any:
    return SimpleNamespace(
        hidden_size=hidden,
        intermediate_size=mlp,
        head_dim=head,
        num_attention_heads=hidden // head,
        num_key_value_heads=hidden // head,
    )


def test_experts() -> None:
    kinds = [QuantType.W4A4_FLATQUANT_DYNAMIC, QuantType.W8A8_FLATQUANT_DYNAMIC, QuantType.FLOAT]
    assert npu_notes(config(640, 1536, 80), [], kinds) == [
        "experts of type W8A8_FLATQUANT_DYNAMIC cannot run on NPUs: vllm-ascend has no kernel for them."
    ]


def test_output_head() -> None:
    sizes = config(640, 1536, 80)
    for vocabulary, notes in ((65535, 0), (151936, 1)):
        sizes.vocab_size = vocabulary
        found = npu_notes(sizes, [], head=QuantType.W8A8_DYNAMIC)
        assert len(found) == notes
        assert npu_notes(sizes, []) == []
    assert found[0].startswith("an output head of type W8A8_DYNAMIC cannot run: 151936 output features on a device")


@pytest.mark.parametrize(
    ("hidden", "mlp", "head", "recipe", "expected"),
    [
        (640, 1536, 80, "tutorial", []),
        # o has one factor only, since the other one is folded into v.
        (576, 1536, 64, "all-w4a4", [("o", Kernel.UNFUSED, "no right_trans")]),
        # 1720 = 5 * 8 * 43: its factor pairs with a multiple of 8 are 43 x 40 and others that fit.
        (640, 1720, 80, "all-w4a4", [("o", Kernel.UNFUSED, "no right_trans")]),
        # 2056 = 8 * 257 and 257 is prime, so that no pair has both factors up to 256.
        (640, 2056, 80, "all-w4a4", [("o", Kernel.UNFUSED, "right_trans"), ("down", Kernel.UNFUSED, "at most 256")]),
        # The int4 product itself needs a multiple of 8.
        (640, 1716, 80, "all-w4a4", [("o", Kernel.UNFUSED, "right_trans"), ("down", None, "need a multiple of 8")]),
    ],
)
def test_kernel_and_reason_are_named(
    hidden: int, mlp: int, head: int, recipe: str, expected: list[tuple[str, Kernel | None, str]]
) -> None:
    notes = npu_notes(config(hidden, mlp, head), RECIPES[recipe].items())
    assert len(notes) == len(expected)
    for note, (role, kernel, reason) in zip(notes, expected, strict=True):
        assert note.startswith(f"{role} layers of type W4A4_FLATQUANT_DYNAMIC ")
        assert (f"will run as {kernel}: " if kernel else "cannot run: ") in note
        assert reason in note


@given(st.integers(1, 40), st.integers(1, 3000), st.sampled_from([16, 64, 66, 128]), st.sampled_from(list(RECIPES)))
def test_notes_are_complete(heads: int, mlp: int, head: int, recipe: str) -> None:
    """A role has a note exactly if the loader would choose another kernel than the fastest one."""
    sizes = config(heads * head, mlp, head)
    notes = "\n".join(npu_notes(sizes, RECIPES[recipe].items()))
    for role, kind in RECIPES[recipe].items():
        output_size, input_size = group_sizes(sizes)[role]
        factors = stored_factors(role, input_size, head) if kind.spec.has_transform else (None, None)
        choice = select_kernel(RankShape(kind, output_size, input_size, 1, *factors), has_fused_library=False)
        fastest = {Kernel.KRONECKER, Kernel.UNTRANSFORMED, Kernel.VLLM_ASCEND}
        has_kernel = not kind.spec.runs_on.isdisjoint({NPU, VLLM_ASCEND})
        assert (f"{Role(role)} layers" in notes) == (not has_kernel or choice.kernel not in fastest)
