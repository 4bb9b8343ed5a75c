# SPDX-License-Identifier: Apache-2.0
"""The trainable parts of a quantized block: linear layers without their codes, and norms."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vllm_w4a4_plugin.checkpoint.types import CLIP_RATIO, LEFT_TRANS, RIGHT_TRANS, WEIGHT, WEIGHT_OFFSET, WEIGHT_SCALE

from ..block.rounding import dequantize, largest_code, smallest_activation
from ..transforms.kronecker import apply_kronecker

SMALLEST_CLIP = 1e-3


class TrainableLinear(nn.Module):
    """A quantized linear layer of which everything but the codes can be trained.

    The parameters are relative changes, zero at first: scale * exp(log_scale), clip * exp(log_clip),
    L (1 + left_change), R (1 + right_change).

    Args:
        tensors: as stored, by suffix.
        bits: of activations.
        bias: [output_size] or None.
    """

    def __init__(self, tensors: Mapping[str, Tensor], bits: int, bias: Tensor | None) -> None:
        super().__init__()
        self.bits, self.bias = bits, bias
        self.scale = tensors[WEIGHT_SCALE]
        # The codes minus their offset: integers for symmetric weights.
        self.codes = dequantize(tensors[WEIGHT].float(), torch.ones_like(self.scale), tensors.get(WEIGHT_OFFSET))
        self.left, self.right, self.clip = (tensors.get(suffix) for suffix in (LEFT_TRANS, RIGHT_TRANS, CLIP_RATIO))
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale))
        self.log_clip, self.left_change, self.right_change = (
            None if t is None else nn.Parameter(torch.zeros_like(t)) for t in (self.clip, self.left, self.right)
        )

    def share_with(self, other: "TrainableLinear") -> None:
        """Train one clip and one transform, where there are any, for both: the layers run as one matrix product."""
        self.log_clip, self.left_change, self.right_change = other.log_clip, other.left_change, other.right_change

    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """The current L [M, M] and R [N, N]."""
        return _changed(self.left, self.left_change), _changed(self.right, self.right_change)

    def clip_ratio(self) -> Tensor | None:
        """The current activation clip [1]."""
        if self.clip is None or self.log_clip is None:
            return None
        return (self.clip * self.log_clip.exp()).clamp(SMALLEST_CLIP, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_size] -> [..., output_size]."""
        top = largest_code(self.bits)
        x = apply_kronecker(x, *self.factors())
        scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny * 1e8) / top
        clip = self.clip_ratio()
        if clip is not None:
            scale = scale * clip
        x = _round(x / scale).clamp(smallest_activation(self.bits), top) * scale
        y = self._product(x)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """The tensors that training changed, as stored, by suffix."""
        left, right = self.factors()
        scale = self.scale * self.log_scale.exp()
        named = {WEIGHT_SCALE: scale, CLIP_RATIO: self.clip_ratio(), LEFT_TRANS: left, RIGHT_TRANS: right}
        return {suffix: tensor.cpu().contiguous() for suffix, tensor in named.items() if tensor is not None}

    def _product(self, x: Tensor) -> Tensor:
        scale = self.scale * self.log_scale.exp()
        if scale.numel() == len(scale):
            return nn.functional.linear(x, self.codes) * scale.flatten()
        return nn.functional.linear(x, dequantize(self.codes, scale))


class RelativeWeight(nn.Module):
    """Parametrization of a norm's weight by the logarithm of its change, rounded to the stored dtype.

    Args:
        start: [n], as stored; its dtype is kept.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.start, self.dtype = start.float(), start.dtype

    def forward(self, log_change: Tensor) -> Tensor:
        """The weight [n]; the gradient is that of the weight without rounding."""
        weight = self.start * log_change.exp()
        return weight + (weight.to(self.dtype).to(weight) - weight).detach()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Zeros: training starts without a change."""
        return torch.zeros_like(weight)


def _changed(factor: Tensor | None, change: Tensor | None) -> Tensor | None:
    return None if factor is None or change is None else factor + factor @ change


def _round(x: Tensor) -> Tensor:
    """Rounded, with the gradient of the identity."""
    return x + (x.round() - x).detach()
