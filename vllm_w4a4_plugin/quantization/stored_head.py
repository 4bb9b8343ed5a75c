# SPDX-License-Identifier: Apache-2.0
"""An output head that is quantized in the checkpoint: the scheme of its type, loaded by vocabulary ranges."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from vllm_w4a4_plugin.checkpoint import CheckpointError

from .linear import AscendW4A4LinearMethod
from .parameters.base import MatrixParameter, unpacked
from .schemes import Layer


class StoredHeadMethod(AscendW4A4LinearMethod):
    """Connects vLLM's `ParallelLMHead` with a scheme, in which a rank has a range of the vocabulary.

    vLLM pads the vocabulary so that ranks have equal ranges; the rows that no token has are zero, as in its own heads.
    """

    def create_weights(self, layer: Layer, *args: Any, **kwargs: Any) -> None:
        spec = self.scheme.spec
        if spec.output_size != layer.org_vocab_size:
            raise CheckpointError(
                f"layer {self.scheme.plan.prefix}, tensor {spec.name}.weight: expected {layer.org_vocab_size} rows, "
                f"one for each token of the vocabulary (config.json), found {spec.output_size}. config.json and "
                "weights come from different models."
            )
        super().create_weights(layer, *args, **{**kwargs, "weight_loader": _loader(layer)})

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        # vLLM's logits processor passes no bias of the head's own.
        return super().apply(layer, x.contiguous(), layer.bias if bias is None else bias)


def _loader(layer: Layer) -> Callable[..., None]:
    """A weight loader that takes this rank's range of a tensor with a row for each token."""

    def load(param: MatrixParameter, loaded_weight: torch.Tensor) -> None:
        loaded, size, indices = unpacked(loaded_weight), layer.org_vocab_size, layer.shard_indices
        if loaded.dim() == 0 or loaded.shape[0] != size:
            problem = f"expected {size} rows, one for each token of the vocabulary, found shape {list(loaded.shape)}"
            raise param.plan.error(param.suffix, None, problem)
        first, last = indices.org_vocab_start_index, indices.org_vocab_end_index
        rows = loaded.reshape(size, -1)[first:last]
        param.load_rows(pad(rows, (0, 0, 0, param.output_size - len(rows))), 0, param.output_size)

    return load
