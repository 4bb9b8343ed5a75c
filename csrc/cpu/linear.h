// SPDX-License-Identifier: Apache-2.0
// Whole operators, made of the kernels of the chosen instruction set. Knows nothing of torch.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels.h"

namespace w4a4 {

// Runs `body(begin, end)` over parts of [0, count), each of at least `grain`, on the caller's thread pool.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

struct Pool {
  ParallelFor parallel_for;
  int64_t threads;
};

// Runs `body(begin, end)` over the tiles of a weight. This is how its output features are shared out among threads, of
// products and of what places the weight in memory: a thread gets the same tiles each time.
inline void for_tiles(int64_t tiles, const Pool& pool, const std::function<void(int64_t, int64_t)>& body) {
  pool.parallel_for(tiles, 1, body);
}

// The transform of an operator call. `left` * `right` is the number of input features; a null factor is the identity.
struct Transform {
  int64_t left, right;
  const float* left_trans;   // [left, left]
  const float* right_trans;  // [right, right]
  float clip;
};

// Range of quantized activations.
struct ActivationRange {
  float min, max;
};
inline constexpr ActivationRange kInt4Range{-8.0f, 7.0f};
inline constexpr ActivationRange kInt8Range{-127.0f, 127.0f};

// The weight side of an operator call; see GemmArgs for the arithmetic.
struct Weight {
  const void* packed;
  const float* scale;   // [out_features, groups]
  const float* offset;  // [out_features, groups] or null
  const void* bias;     // [out_features] of type bias_dtype, or null
  Dtype bias_dtype;
  int64_t out_features, in_features, groups;
  const int32_t* quant_bias = nullptr;  // [out_features] or null
};

// What is computed of each token right before its transform, rounded to its type as if it went through memory.
struct Step {
  enum class Kind { kNone, kNorm, kSilu } kind = Kind::kNone;
  // For kNorm: the token is the norm of x and residual, which is updated.
  NormArgs norm{};
  // For kSilu x is [tokens, 2 * features], gate beside up, and the token silu(gate) * up.
  int64_t row_features(int64_t features) const { return kind == Kind::kSilu ? 2 * features : features; }
  // The same for the tokens from `token` on.
  Step from_token(int64_t token) const;
};

// x [tokens, in_features] -> y [tokens, out_features], both of type `dtype`; activations are quantized to `range`.
void flatquant_linear(const void* x, Dtype dtype, int64_t tokens, const Transform& transform, ActivationRange range,
                      const Weight& weight, void* y, const Kernels& kernels, const Pool& pool, const Step& step = {});

// y [tokens, features] = RMSNorm; see NormArgs.
void rms_norm(const NormArgs& args, int64_t tokens, void* y, const Kernels& kernels, const Pool& pool);

// The same with int8 weights and int8 activations.
void w8a8_linear(const void* x, Dtype dtype, int64_t tokens, const Transform& transform, const Weight& weight, void* y,
                 const Kernels& kernels, const Pool& pool);

// x [tokens, features] of type `dtype` -> q [tokens, features] in `range`, scale [tokens]. Where x has parts of tokens,
// token_maximum [tokens] is the largest magnitude of each whole one, else null.
void kronecker_quant(const void* x, Dtype dtype, int64_t tokens, int64_t features, const Transform& transform,
                     const float* token_maximum, ActivationRange range, int8_t* q, float* scale, const Kernels& kernels,
                     const Pool& pool);

// Already quantized tokens q [tokens, in_features] in `range`, with scales -> y [tokens, out_features] of type `dtype`.
void int4_linear(const int8_t* q, const float* scale, int64_t tokens, ActivationRange range, const Weight& weight,
                 void* y, Dtype dtype, const Kernels& kernels, const Pool& pool);

// The same with int8 weights and any int8 activations.
void int8_linear(const int8_t* q, const float* scale, int64_t tokens, const Weight& weight, void* y, Dtype dtype,
                 const Kernels& kernels, const Pool& pool);

}  // namespace w4a4
