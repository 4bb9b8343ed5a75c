# SPDX-License-Identifier: Apache-2.0
"""The routed experts of a layer on Ascend NPUs, through torch_npu. Tested with a stand-in for it, never run on an NPU.

Tokens are sorted by expert. npu_grouped_matmul multiplies those of each expert by the weights of that expert:
https://gitcode.com/Ascend/op-plugin/blob/7.3.0/docs/context/torch_npu-npu_grouped_matmul.md

For int4 x int4 it takes weights [experts, in, out] that are not transposed, so eight *outputs* share an int32 here, and
scales in 64 bits, whose low 32 are those of a float32. The cube unit's output path keeps the upper 19 of these
(https://gitcode.com/cann/ops-nn/blob/master/quant/trans_quant_param/docs/aclnnTransQuantParam.md): scales are rounded
to them beforehand, to the nearest, which errs by at most 2**-11. By CANN's sources, the scaled product leaves the cube
unit in float16 and is multiplied by the token's scale in float32.

Rows beyond the last group are not written by npu_grouped_matmul: they hold whatever was in memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import cann
from .select import INT4_PER_WORD

DROPPED_BITS = 13
"""Low bits of a float32 scale that the cube unit's output path drops."""


@dataclass(frozen=True)
class Groups:
    """Which rows belong to which expert.

    Attributes:
        ends: int64 [experts], the row after the last one of each.
        rows: of the tokens, at least `ends[-1]`.
    """

    ends: Tensor
    rows: int

    @classmethod
    def of(cls, group_list: Tensor, group_list_type: int, rows: int) -> "Groups":
        """From a group_list of npu_grouped_matmul: running totals (type 0) or numbers of rows (type 1)."""
        if group_list_type not in (0, 1):
            raise NotImplementedError(f"group_list_type {group_list_type}")
        group_list = group_list.to(torch.int64)
        # As numbers of rows, npu_grouped_matmul does not take a list of a single expert.
        return cls(group_list if group_list_type == 0 else group_list.cumsum(0), rows)

    def expert_of_row(self) -> Tensor:
        """int64 [rows], the last expert for rows beyond the last group."""
        rows = torch.arange(self.rows, dtype=torch.int64, device=self.ends.device)
        return torch.searchsorted(self.ends, rows, right=True).clamp_(max=self.ends.shape[0] - 1)

    def clear_rest(self, y: Tensor) -> Tensor:
        """`y` [rows, ...] with zeros in rows beyond the last group."""
        rows = torch.arange(self.rows, dtype=torch.int64, device=self.ends.device)
        return y.masked_fill((rows >= self.ends[-1])[:, None], 0)


def pack_grouped(weight: Tensor, device: torch.device) -> Tensor:
    """int8 [out, in] of int4 values -> int32 [in, out / 8] on `device`."""
    return cann.pack_int4(weight.t(), device)


def scale_words(scale: Tensor) -> Tensor:
    """float32 scales as npu_grouped_matmul takes them for int4: int64, rounded to the bits that count."""
    bits = scale.float().contiguous().view(torch.int32).to(torch.int64)
    half, odd = 1 << (DROPPED_BITS - 1), (bits >> DROPPED_BITS) & 1
    return (bits + half - 1 + odd) >> DROPPED_BITS << DROPPED_BITS


def grouped_linear(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, groups: Groups, dtype: torch.dtype
) -> Tensor:
    """scale * weight_scale * (q . weight) with the weight of each row's expert.

    Args:
        q: int32 [rows, in / 8]. scale: float32 [rows].
        weight: int32 [experts, in, out / 8].
        weight_scale: int64 from `scale_words`, [experts, out] or [experts, scale groups, out].
        groups: of the rows.
        dtype: of the result, bfloat16 or float16.

    Returns:
        [rows, out], undefined beyond the last group.
    """
    import torch_npu

    return torch_npu.npu_grouped_matmul(
        [q],
        [weight],
        scale=[weight_scale],
        per_token_scale=[scale],
        group_list=groups.ends,
        split_item=2,
        group_type=0,
        group_list_type=0,
        output_dtype=dtype,
    )[0]


def linear_per_expert(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    groups: Groups,
    dtype: torch.dtype,
) -> Tensor:
    """`grouped_linear` with a bias, as one product for each expert; waits for the device to learn the groups' sizes.

    Args:
        weight: int32 [experts, out, in / 8]. weight_scale: float32 [experts, out].
        bias: float32 [experts, out] or None.
        q, scale, groups, dtype: as there.
    """
    y = q.new_zeros((q.shape[0], weight.shape[1]), dtype=dtype)
    first = 0
    for expert, end in enumerate(groups.ends.tolist()):
        if end > first:
            own = None if bias is None else bias[expert]
            y[first:end] = cann.int4_linear(
                q[first:end], scale[first:end], weight[expert], weight_scale[expert], own, dtype
            )
        first = end
    return y


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [rows, 2 * intermediate] -> [rows, intermediate]."""
    import torch_npu

    return torch_npu.npu_swiglu(gate_up)


def transform(x: Tensor, left_trans: Tensor | None, right_trans: Tensor | None, groups: Groups) -> Tensor:
    """x' = x @ kron(L, R) with the factors of each row's expert, rounded to x's dtype after each product.

    Args:
        x: bfloat16 or float16 [rows, features].
        left_trans: [experts, M, M] as in the checkpoint, in x's dtype; None is the identity.
        right_trans: [experts, N, N] in x's dtype; None is the identity.
        groups: of the rows.
    """
    rows, features = x.shape
    right = right_trans.shape[-1] if right_trans is not None else None
    left = left_trans.shape[-1] if left_trans is not None else features // right if right else 1
    tokens = x.reshape(rows, left, features // left)
    if right_trans is not None:
        tokens = _grouped_matmul(tokens, right_trans, groups)
    if left_trans is not None:
        # L^T X is the transpose of X^T L.
        tokens = _grouped_matmul(tokens.transpose(1, 2), left_trans, groups).transpose(1, 2)
    return tokens.reshape(rows, features)


def clamp_tokens(x: Tensor, clip_ratios: Tensor, groups: Groups) -> Tensor:
    """Each row within the clip ratio of its expert times its largest magnitude, as in `cann.unfused_quant`.

    Args:
        x: [rows, features]. clip_ratios: float32 [experts].
    """
    bound = x.abs().amax(-1, keepdim=True) * clip_ratios[groups.expert_of_row()][:, None].to(x.dtype)
    return torch.minimum(torch.maximum(x, -bound), bound)


def words(features: int) -> int:
    """int32 words that a row of so many int4 values takes."""
    return features // INT4_PER_WORD


def _grouped_matmul(tokens: Tensor, factors: Tensor, groups: Groups) -> Tensor:
    """[rows, a, b] @ [experts, b, b] with the factor of each row's expert."""
    import torch_npu

    rows, repeats, size = tokens.shape
    (y,) = torch_npu.npu_grouped_matmul(
        [tokens.reshape(rows * repeats, size).contiguous()],
        [factors],
        group_list=groups.ends * repeats,
        split_item=2,
        group_type=0,
        group_list_type=0,
        output_dtype=tokens.dtype,
    )
    return y.view(rows, repeats, size)
