# SPDX-License-Identifier: Apache-2.0
"""A model whose residual stream is rotated by an orthogonal matrix folded into all weights (QuaRot, arXiv 2404.00456).

Norm weights move into the linear layers behind them first; an RMSNorm without weights commutes with the rotation. The
model computes what it did before, but no channel of the stream stands out, at no cost at run time.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from .hadamard import random_flat_orthogonal
from .model import StreamedModel
from .structure import Role, linear


class RotatedModel(StreamedModel):
    """`StreamedModel` with the rotation folded in.

    Args:
        directory, device, trust_remote_code: as there.
        seed: of the rotation.

    Raises:
        CalibrationError: as there, or the blocks have no norms that a rotation could pass.
    """

    def __init__(self, directory: Path, device: str = "cpu", trust_remote_code: bool = False, seed: int = 0) -> None:
        super().__init__(directory, device, trust_remote_code)
        generator = torch.Generator().manual_seed(seed)
        self.rotation = random_flat_orthogonal(self.hidden_size, generator).to(self.device)
        self._rotate_outer()

    def load_block(self, index: int) -> nn.Module:
        """Block `index`, rotated; its norms' weights are ones."""
        block = super().load_block(index)
        for group in self.groups[index].values():
            for name in group.linears:
                module = linear(block, name)
                if group.norm:
                    norm_weight = block.get_submodule(group.norm).weight
                    assert isinstance(norm_weight, Tensor)
                    weight = module.weight.double() * norm_weight
                    module.weight.copy_(weight @ self.rotation)
                elif group.role in (Role.O, Role.DOWN):
                    module.weight.copy_(self.rotation.t() @ module.weight.double())
                    if module.bias is not None:
                        module.bias.copy_(module.bias.double() @ self.rotation)
        for group in self.groups[index].values():
            if group.norm:
                nn.init.ones_(block.get_submodule(group.norm).weight)  # type: ignore[arg-type]
        return block

    def outer_tensors(self) -> dict[str, Tensor]:
        """Rotated embedding and head, which are no longer one matrix, and a final norm of ones."""
        named = dict(self.skeleton.named_parameters())
        tensors = super().outer_tensors()
        return {name: named[name].detach().to("cpu", tensor.dtype) for name, tensor in tensors.items()}

    def _rotate_outer(self) -> None:
        embedding, head = self.skeleton.get_input_embeddings(), self.skeleton.get_output_embeddings()
        norm = next(
            m for m in self.skeleton.get_decoder().children() if getattr(getattr(m, "weight", None), "ndim", 0) == 1
        )
        head.weight = nn.Parameter(((head.weight.double() * norm.weight) @ self.rotation).float(), requires_grad=False)
        rotated = (embedding.weight.double() @ self.rotation).float()
        embedding.weight = nn.Parameter(rotated, requires_grad=False)
        nn.init.ones_(norm.weight)
