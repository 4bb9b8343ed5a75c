# SPDX-License-Identifier: Apache-2.0
"""A model whose residual stream is rotated by an orthogonal matrix folded into all weights (QuaRot, arXiv 2404.00456).

Norm weights are first folded into the linear layers that follow them, because an RMSNorm without weights commutes with
the rotation. The model computes the same function, but no channel of the stream stands out, at no cost at run time.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from vllm_w4a4_plugin.ops.orthogonal import random_flat_orthogonal

from ..errors import CalibrationError
from .streamed import StreamedModel
from .structure import Group, Role
from .tracing import linear
from .unsupported import family, has_vision

LARGEST_DIFFERENCE = 1e-2  # relative, of what a block adds to the residual stream
_CHECKED_TOKENS = 8


class RotatedModel(StreamedModel):
    """`StreamedModel` with the rotation folded in.

    Args:
        directory, device, trust_remote_code: as for `StreamedModel`.
        seed: of the rotation.

    Raises:
        CalibrationError: as for `StreamedModel`, or the blocks do not commute with a rotation.
    """

    def __init__(self, directory: Path, device: str = "cpu", trust_remote_code: bool = False, seed: int = 0) -> None:
        super().__init__(directory, device, trust_remote_code)
        if has_vision(self.config):
            raise CalibrationError(
                f"{directory}: the vision part of this {family(self.config)} model adds to the residual stream, which "
                "the recipe w4a4-dynamic would rotate. Use another recipe."
            )
        if names := self.mtp_names():
            raise CalibrationError(
                f"{directory}: tensor {names[0]} is of a layer for multi-token prediction, whose input the recipe "
                "w4a4-dynamic would rotate. Use another recipe."
            )
        generator = torch.Generator().manual_seed(seed)
        self.rotation = random_flat_orthogonal(self.hidden_size, generator).to(self.device)
        self._check_blocks()
        self._rotate_outer()

    def load_block(self, index: int) -> nn.Module:
        """Block `index`, rotated; the weights of its norms are ones."""
        block = super().load_block(index)
        groups = self.groups[index].values()
        for group in groups:
            for name in group.linears:
                self._rotate(linear(block, name), group, block)
        for group in groups:
            if group.norm:
                nn.init.ones_(block.get_submodule(group.norm).weight)  # type: ignore[arg-type]
        return block

    def outer_tensors(self) -> dict[str, Tensor]:
        """The rotated embedding and head, which are no longer one matrix, and a final norm of ones."""
        named = dict(self.skeleton.named_parameters())
        tensors = super().outer_tensors()
        return {name: named[name].detach().to("cpu", tensor.dtype) for name, tensor in tensors.items()}

    def _rotate(self, module: nn.Linear, group: Group, block: nn.Module) -> None:
        """Rotate the input of a layer that reads the residual stream, or the output of one that adds to it."""
        if group.norm:
            norm_weight = block.get_submodule(group.norm).weight
            assert isinstance(norm_weight, Tensor)
            weight = module.weight.double() * norm_weight
            module.weight.copy_(weight @ self.rotation)
        elif group.role in (Role.O, Role.DOWN):
            module.weight.copy_(self.rotation.t() @ module.weight.double())
            if module.bias is not None:
                module.bias.copy_(module.bias.double() @ self.rotation)

    def _check_blocks(self) -> None:
        """Refuse blocks with parts that no rotation can be folded into, such as norms after a sublayer and experts."""
        hidden, _ = self.start(torch.zeros(1, _CHECKED_TOKENS, dtype=torch.long))
        sample = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
        rotation = self.rotation.to(sample)
        for index, groups in enumerate(self.groups):
            if any(groups is earlier for earlier in self.groups[:index]):
                continue
            plain, rotated = super().load_block(index), self.load_block(index)
            with torch.no_grad():
                expected = (self.run_block(plain, index, sample) - sample) @ rotation
                found = self.run_block(rotated, index, sample @ rotation) - sample @ rotation
            if (found - expected).norm() > LARGEST_DIFFERENCE * expected.norm():
                raise CalibrationError(
                    f"{self.directory}: {self.block_name(index)} of this {family(self.config)} model computes "
                    "something else if its input is rotated, so the recipe w4a4-dynamic, which folds a rotation into "
                    "the whole model, cannot be used. Use another recipe."
                )

    def _rotate_outer(self) -> None:
        embedding, head = self.skeleton.get_input_embeddings(), self.skeleton.get_output_embeddings()
        norm = next(
            m for m in self.skeleton.get_decoder().children() if getattr(getattr(m, "weight", None), "ndim", 0) == 1
        )
        head.weight = nn.Parameter(((head.weight.double() * norm.weight) @ self.rotation).float(), requires_grad=False)
        rotated = (embedding.weight.double() @ self.rotation).float()
        embedding.weight = nn.Parameter(rotated, requires_grad=False)
        nn.init.ones_(norm.weight)
