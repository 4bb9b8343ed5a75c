# SPDX-License-Identifier: Apache-2.0
"""A stand-in for torch_npu on CPU, for tests: the operators of `operators.py`, and names that vllm-ascend imports.

Whatever is not here is an AttributeError, and a name that exists only to be imported raises when it is called, so no
test can pass through an operator that the stand-in does not compute.
"""

import sys
import types
from typing import Any

import torch

from . import device, experts, operators
from .experts import moe_init_routing as npu_moe_init_routing_v2
from .experts import npu_grouped_matmul, npu_moe_token_unpermute, npu_swiglu
from .operators import (
    npu_convert_weight_to_int4pack,
    npu_dynamic_quant,
    npu_format_cast,
    npu_kronecker_quant,
    npu_quant_matmul,
)

__version__ = "2.10.0.post4"

__all__ = [
    "device",
    "experts",
    "npu_convert_weight_to_int4pack",
    "npu_dynamic_quant",
    "npu_format_cast",
    "npu_grouped_matmul",
    "npu_kronecker_quant",
    "npu_moe_init_routing_v2",
    "npu_moe_token_unpermute",
    "npu_quant_matmul",
    "npu_swiglu",
    "operators",
]


def _only_a_name(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"torch_npu.{name} is not part of the stand-in")

    return call


# transformers imports it when it sees torch_npu.
npu_fusion_attention = _only_a_name("npu_fusion_attention")

# dtypes of Ascend 950 that vllm-ascend names in tables.
float8_e8m0fnu, float4_e2m1fn_x2, hifloat8 = object(), object(), object()

# Classes that vllm-ascend imports or names in annotations.
_C = types.ModuleType("torch_npu._C")
_C._NPUTaskGroupHandle = type("_NPUTaskGroupHandle", (), {})
_distributed = types.ModuleType("torch_npu._C._distributed_c10d")
_distributed.ProcessGroupHCCL = type("ProcessGroupHCCL", (), {})

npu = types.ModuleType("torch.npu")
vars(npu).update(
    is_available=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    synchronize=lambda: None,
    current_stream=device.current_stream,
    empty_cache=lambda: None,
    memory_stats=_only_a_name("npu.memory_stats"),
    max_memory_allocated=_only_a_name("npu.max_memory_allocated"),
    memory_reserved=_only_a_name("npu.memory_reserved"),
    reset_peak_memory_stats=_only_a_name("npu.reset_peak_memory_stats"),
    mem_get_info=lambda index=0: device.mem_get_info(index),
    get_device_name=lambda index=0: device.get_device_name(index),
    get_device_properties=lambda index=0: device.get_device_properties(index),
    set_device=lambda index: None,
    Stream=device.Stream,
    Event=device.Event,
    ExternalEvent=type("ExternalEvent", (), {}),
    NPUGraph=device.NPUGraph,
    graph=device.graph,
)

torch.utils.rename_privateuse1_backend("npu")
torch.npu = npu
torch.distributed.is_hccl_available = lambda: False
torch.Tensor.npu = lambda self: self
torch.Tensor.is_npu = property(lambda self: False)
sys.modules |= {_C.__name__: _C, _distributed.__name__: _distributed}
sys.modules["torch.npu"] = sys.modules["torch_npu.npu"] = npu
