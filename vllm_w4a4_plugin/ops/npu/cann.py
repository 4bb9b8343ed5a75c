# SPDX-License-Identifier: Apache-2.0
"""The W4A4 operators on Ascend NPUs, through torch_npu. Tested with a stand-in for torch_npu, never run on an NPU.

The contracts are those of `ops.api`, in the NPU's own forms: eight int4 values in an int32 (element 0 in the low
nibble), weights [out, in / 8] from `npu_convert_weight_to_int4pack`, activations bfloat16 or float16, and the left
factor stored as L^T in the dtype of the activations, because npu_kronecker_quant does not transpose its P1.

A clip ratio is an attribute of npu_kronecker_quant, not a tensor. A number would be frozen into compiled graphs, so the
operator here takes a slot, a process-wide index into the clip ratios in use.

Values that are not finite, as far as CANN's documents go (A2 and A3 in their default mode, INF_NAN_MODE_ENABLE=1): an
infinity makes the scale of its token infinite and its outputs infinite or NaN. What the maximum of aclnnFlatQuant and
aclnnDynamicQuant makes of NaN is not documented; the tests' stand-in takes it to be NaN. In saturation mode (0) NaN
becomes 0 and infinity the largest finite value, before anything here could see it.
"""

from itertools import count

import torch
from torch import Tensor

from .select import INT4_PER_WORD, KRONECKER_TOKENS

NAMESPACE = "vllm_w4a4_npu"
DISPATCH_KEY = "PrivateUse1"
PACKED_AT_ONCE = 1 << 25
"""Number of weights that are widened to int32 at a time while packing."""

# A fragment: the project's fused library defines its operators in the same namespace.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("kronecker_quant(Tensor x, Tensor left_trans_t, Tensor right_trans, int clip_slot) -> (Tensor, Tensor)")
_library.define("dynamic_quant(Tensor x, Tensor? clip_ratio) -> (Tensor, Tensor)")
_library.define(
    "int4_linear(Tensor q, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType out_dtype)"
    " -> Tensor"
)

STALE_GRAPH = (
    "a weight is in the form of another kernel than the one that is called: vLLM reused a graph that it compiled when "
    "the layers had other kernels. Delete its compiled graphs (torch_compile_cache in VLLM_CACHE_ROOT, by default "
    "~/.cache/vllm), or start with VLLM_DISABLE_COMPILE_CACHE=1."
)
"""What the operators say of a weight in the wrong form."""

_slots = count()
_clip_ratios: dict[int, float] = {}
_registered: set[str] = set()


def kronecker_quant(x: Tensor, left_trans_t: Tensor, right_trans: Tensor, clip_slot: int) -> tuple[Tensor, Tensor]:
    """Transform and quantize tokens in one operator.

    Args:
        x: bfloat16 or float16 [..., in].
        left_trans_t: L^T [M, M] in x's dtype; M, N <= 256.
        right_trans: R [N, N] in x's dtype; N % 8 == 0.
        clip_slot: from `new_clip_slot`.

    Returns:
        (q int32 [..., in / 8], scale float32 [...]).
    """
    return torch.ops.vllm_w4a4_npu.kronecker_quant(x, left_trans_t, right_trans, clip_slot)


def unfused_quant(
    x: Tensor, left_trans_t: Tensor | None, right_trans: Tensor | None, clip_ratio: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`kronecker_quant` as matrix products and npu_dynamic_quant, for factors that npu_kronecker_quant does not take.

    The transform is rounded to x's dtype after each product. Clipping clamps each token to clip_ratio * max|x'| first,
    which gives the formula's int4 values except for -8, which becomes -7 (see `select.EXACT_CLAMP_CLIP`). The bound of
    a token with a NaN is NaN, so all of the token becomes NaN before npu_dynamic_quant sees it.

    Args:
        x: bfloat16 or float16 [..., in].
        left_trans_t, right_trans: in x's dtype; None is the identity.
        clip_ratio: float32, of which the first element is used; None is 1.
    """
    if left_trans_t is not None or right_trans is not None:
        x = _transform(x, left_trans_t, right_trans)
    return torch.ops.vllm_w4a4_npu.dynamic_quant(x, clip_ratio)


def int4_linear(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """scale * weight_scale * (q . weight) + bias, all of it in npu_quant_matmul.

    Args:
        q: int32 [..., in / 8]. scale: float32 [...].
        weight: int32 [out, in / 8]. weight_scale: float32 [out].
        bias: [out], float32 or `out_dtype`, or None.
        out_dtype: bfloat16 or float16.

    Returns:
        [..., out] of `out_dtype`.
    """
    return torch.ops.vllm_w4a4_npu.int4_linear(q, scale, weight, weight_scale, bias, out_dtype)


def pack_int4(weight: Tensor, device: torch.device) -> Tensor:
    """int8 [out, in] of int4 values -> int32 [out, in / 8] on `device`, some rows at a time."""
    import torch_npu

    rows = max(1, PACKED_AT_ONCE // weight.shape[1])
    parts = [
        torch_npu.npu_convert_weight_to_int4pack(part.to(device=device, dtype=torch.int32).contiguous())
        for part in weight.split(rows)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def new_clip_slot() -> int:
    """An index for the clip ratio of one more layer."""
    return next(_slots)


def clip_ratio(slot: int) -> float | None:
    """The clip ratio in a slot, None if none was set yet."""
    return _clip_ratios.get(slot)


def set_clip_ratio(slot: int, value: float) -> None:
    """Set the clip ratio of a slot, a number in (0, 1]; later calls use it."""
    _clip_ratios[slot] = value


def runs_on(device: torch.device) -> bool:
    """Whether the implementations are registered for a device; torch_npu calls that of NPUs "npu"."""
    return (DISPATCH_KEY if device.type in ("npu", "privateuseone") else device.type.upper()) in _registered


def register_kernels(dispatch_key: str = DISPATCH_KEY) -> None:
    """Register the implementations for a device; importing this module does it for NPUs."""
    _registered.add(dispatch_key)
    _library.impl("kronecker_quant", _kronecker_quant, dispatch_key)
    _library.impl("dynamic_quant", _dynamic_quant, dispatch_key)
    _library.impl("int4_linear", _int4_linear, dispatch_key)


def _transform(x: Tensor, left_trans_t: Tensor | None, right_trans: Tensor | None) -> Tensor:
    features = x.shape[-1]
    if left_trans_t is not None:
        left = left_trans_t.shape[0]
    else:
        left = features // right_trans.shape[0] if right_trans is not None else 1
    tokens = x.reshape(-1, left, features // left)
    if right_trans is not None:
        tokens = tokens @ right_trans
    if left_trans_t is not None:
        tokens = left_trans_t @ tokens
    return tokens.reshape(x.shape)


def _kronecker_quant(x: Tensor, left_trans_t: Tensor, right_trans: Tensor, clip_slot: int) -> tuple[Tensor, Tensor]:
    import torch_npu

    left, right = left_trans_t.shape[0], right_trans.shape[0]
    if x.numel() == 0:
        return _empty_quantized(x)  # the operator refuses empty tensors
    clip = _clip_ratios[clip_slot]
    parts = [
        torch_npu.npu_kronecker_quant(part, left_trans_t, right_trans, clip_ratio=clip, dst_dtype=torch.int32)
        for part in x.reshape(-1, left, right).split(KRONECKER_TOKENS)
    ]
    q, scale = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return _shaped_like(x, q, scale)


def _dynamic_quant(x: Tensor, clip_ratio: Tensor | None) -> tuple[Tensor, Tensor]:
    import torch_npu

    if x.numel() == 0:
        return _empty_quantized(x)
    tokens = x.reshape(-1, x.shape[-1])
    if clip_ratio is not None:
        bound = tokens.abs().amax(-1, keepdim=True) * clip_ratio[:1].to(x.dtype)
        tokens = torch.minimum(torch.maximum(tokens, -bound), bound)
    return _shaped_like(x, *torch_npu.npu_dynamic_quant(tokens, dst_type=torch.quint4x2))


def _int4_linear(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    import torch_npu

    if weight.dim() != 2:
        raise RuntimeError(STALE_GRAPH)
    if q.numel() == 0:
        return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=out_dtype)
    if bias is not None and bias.dtype not in (out_dtype, torch.float32):
        bias = bias.float()
    y = torch_npu.npu_quant_matmul(
        q.reshape(-1, q.shape[-1]),
        weight.t(),
        weight_scale,
        pertoken_scale=scale.reshape(-1),
        bias=bias,
        output_dtype=out_dtype,
    )
    return y.view(*q.shape[:-1], weight.shape[0])


def _shaped_like(x: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return q.view(*x.shape[:-1], x.shape[-1] // INT4_PER_WORD), scale.view(x.shape[:-1])


def _empty_quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized tokens without values: for empty x, and for fake tensors."""
    return (
        x.new_empty((*x.shape[:-1], x.shape[-1] // INT4_PER_WORD), dtype=torch.int32),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    )


@torch.library.register_fake(f"{NAMESPACE}::kronecker_quant")
def _(x: Tensor, left_trans_t: Tensor, right_trans: Tensor, clip_slot: int) -> tuple[Tensor, Tensor]:
    return _empty_quantized(x)


@torch.library.register_fake(f"{NAMESPACE}::dynamic_quant")
def _(x: Tensor, clip_ratio: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty_quantized(x)


@torch.library.register_fake(f"{NAMESPACE}::int4_linear")
def _(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=out_dtype)


register_kernels()
