# SPDX-License-Identifier: Apache-2.0
"""Whether a model's dtype was left to vLLM (`auto`) or named by the user.

vLLM replaces `auto` while it constructs the `ModelConfig`, before it asks the platform for defaults. The function that
does it sees both the request and the model's configuration, so it is wrapped.
Drop this when a platform can see the dtype that was requested.
"""

import weakref
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

AUTO = "auto"

# Keyed by identity, because configurations are not hashable.
_resolved_automatically: dict[int, "weakref.ref[PreTrainedConfig]"] = {}


def was_automatic(hf_config: "PreTrainedConfig") -> bool:
    """Whether vLLM chose the dtype of the model with this configuration, in this process."""
    reference = _resolved_automatically.get(id(hf_config))
    return reference is not None and reference() is hf_config


def observe() -> None:
    """Remember from now on which models got their dtype automatically. Idempotent."""
    import vllm.config.model  # imports the platform, which imports this

    original = vllm.config.model._get_and_verify_dtype
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def observed(model_id: str, config: Any, dtype: Any, **arguments: Any) -> "torch.dtype":
        _resolved_automatically.pop(id(config), None)
        if isinstance(dtype, str) and dtype.lower() == AUTO:
            _resolved_automatically[id(config)] = weakref.ref(config)
        return original(model_id, config, dtype, **arguments)

    vllm.config.model._get_and_verify_dtype = observed
