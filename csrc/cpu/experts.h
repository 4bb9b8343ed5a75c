// SPDX-License-Identifier: Apache-2.0
// The routed experts of one layer as one operator. Knows nothing of torch.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "linear.h"

namespace w4a4 {

// Which experts each token goes to.
struct Routing {
  const float* weights;    // [tokens, top_k]
  const int32_t* experts;  // [tokens, top_k]: places in ExpertWeights, negative for an expert that is not there
  int64_t top_k;
};

// One matrix of every expert; see GemmArgs for the arithmetic.
struct ExpertWeights {
  const void* packed;   // [experts, tiles, blocks, block_bytes]
  int64_t block_bytes;  // kBlockBytes for int4 weights, kInt8BlockBytes for int8 weights and activations
  const float* scale;   // [experts, out_features, groups]
  const float* offset;  // [experts, out_features, groups] or null
  const float* bias;    // [experts, out_features] or null
  int64_t experts, out_features, in_features, groups;
  bool wide_activations = false;  // int8 activations for int4 weights
};

// The transform before a matrix, one for all experts or one for each. A null factor is the identity.
struct ExpertTransform {
  int64_t left, right;                          // left * right = in_features
  const float* left_trans;                      // [left_count, left, left]
  const float* right_trans;                     // [right_count, right, right]
  const float* clip;                            // [clip_count]
  int64_t left_count, right_count, clip_count;  // 1 or the number of experts
};

// x [tokens, hidden] of type `dtype` -> y [tokens, hidden] of the same type, or of type double if `is_double`:
//
//   h = silu(gate) * up, where [gate, up] is gate_up of the transformed, quantized token
//   y = sum_j weights[j] * down(h of expert j), with h transformed and quantized by that expert
//
// `gate_up` has 2 * down.in_features output features, those of gate first; its transform must be one for all experts.
// Everything between the integer products is float32. The sum over j is double: its order, and which rank adds which
// terms, show in bits only that a float has no room for. A token that goes to no expert of this operator gives 0.
void experts_mlp(const void* x, Dtype dtype, int64_t tokens, const Routing& routing,
                 const ExpertTransform& gate_up_transform, const ExpertWeights& gate_up,
                 const ExpertTransform& down_transform, const ExpertWeights& down, void* y, bool is_double,
                 const Kernels& kernels, const Pool& pool);

}  // namespace w4a4
