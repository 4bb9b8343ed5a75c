// SPDX-License-Identifier: Apache-2.0
// The kernel launch of a device build, defined in kernels/flatquant_linear.cpp. Includes nothing that a device compiler
// lacks.
#pragma once

#include "../kernels/tiling_data.h"

namespace w4a4::npu {

// Addresses in device memory. `left`, `right` and `bias` are null where the linear has none.
struct LinearPointers {
  const void* x;             // half or bfloat16 [tokens][in_features]
  const void* left;          // the same dtype [left][left]
  const void* right;         // the same dtype [right][right]
  const void* weight;        // int4 nZ, vllm_w4a4_plugin/ops/npu/nz.py
  const void* weight_scale;  // float32 [groups][out_features]
  const void* bias;          // float32 [out_features]
  void* y;                   // the same dtype as x [tokens][out_features]
  void* workspace;           // tiling.workspace_bytes
};

// One launch on `stream` (an aclrtStream), asynchronous.
void launch_flatquant_linear(void* stream, uint32_t cores, bool is_half, Factors factors, TokenClass token_class,
                             const TilingData& tiling, const LinearPointers& at);

// One phase in a launch of its own, for a tiling from share_activations: 1 transforms and quantizes into the workspace,
// 2 multiplies what is there. False if this combination was not compiled; only bfloat16 is.
bool launch_flatquant_phase(void* stream, uint32_t cores, uint32_t phase, Factors factors, TokenClass token_class,
                            const TilingData& tiling, const LinearPointers& at);

}  // namespace w4a4::npu
