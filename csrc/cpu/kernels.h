// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set, and the table that chooses among them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "layout.h"

namespace w4a4 {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t dtype_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Transform and per-token quantization of a block of tokens.
//
// With q_max = 7 and q_min = -8 (int4) or q_max = 127 and q_min = -127 (int8): a token x of `features` values, viewed
// as X [left, right], becomes X' = left_trans^T (X right_trans); a null factor is the identity. scale = clip * max|X'|
// / q_max and q = clamp(round_half_even(X' / scale), q_min, q_max). Where the scale is 0 (an all-zero token, or one of
// values so small that the scale rounds to 0) q is 0. Where max|X'| is not finite the scale is NaN and q is 0: whatever
// is computed from the token is NaN. With a token_maximum, which is for tokens that are parts of longer ones, max|X'|
// is at least that.
struct QuantizeArgs {
  const void* x;  // [tokens, features], row-major, of type `dtype`
  Dtype dtype;
  int64_t features;          // left * right
  int64_t left, right;       // sizes of the view; 1 x features without transform
  const float* left_trans;   // [left, left] or null
  const float* right_trans;  // [right, padded_right] with zeros beyond `right`, or null
  int64_t padded_right;      // row stride of right_trans and of the scratch, a multiple of kTransformPadding
  float clip;
  float q_min, q_max;
  const float* token_maximum;  // [tokens] or null
  int64_t groups;              // sums of q are wanted for each of this many equal parts of a token
  int8_t* q;                   // [tokens, q_stride]; bytes beyond `features` are set to 0
  int64_t q_stride;
  float* scale;     // [tokens]
  int32_t* q_sums;  // [tokens, groups], or null
};

inline constexpr int64_t kTransformPadding = 16;

// Floats of scratch that one token's transform needs: two [left, padded_right] matrices.
inline int64_t transform_scratch(const QuantizeArgs& args) { return 2 * args.left * args.padded_right; }

// RMSNorm of tokens, in float32:
//
//   s[i] = x[i] + residual[i], y[i] = s[i] / sqrt(mean(s^2) + epsilon) * weight[i]
//
// s, rounded to `dtype`, takes the place of the residual; without a residual s is x.
struct NormArgs {
  const void* x;       // [tokens, features] of type `dtype`
  void* residual;      // [tokens, features] of type `dtype`, or null
  const void* weight;  // [features] of type `dtype`
  Dtype dtype;
  int64_t features;
  float epsilon;
};

constexpr int64_t padded_features(int64_t features) {
  return ceil_div(features, kTransformPadding) * kTransformPadding;
}

// Floats of scratch that the norm of a token needs.
constexpr int64_t norm_scratch(int64_t features) { return padded_features(features); }

// The integer matrix product with dequantization.
//
//   y[t][o] = scale[t] * sum_g weight_scale[o][g] * (sum_{k in g} q[t][k] * (w[o][k] - weight_offset[o][g])) + bias[o]
//
// With a quant_bias, which excludes groups, quant_bias[o] is added to the sum over k, in 32-bit integers.
struct GemmArgs {
  const int8_t* q;             // panels of token_stride(in_features) bytes a token, then kPanelSlack readable bytes
  Panels panels;               // of at most Gemm::panel_tokens tokens
  const float* scale;          // [tokens]
  const int32_t* q_sums;       // [tokens, groups]
  const void* packed;          // see layout.h
  int32_t zero_point;          // what the stored weights are larger by
  const float* weight_scale;   // [out_features, groups]
  const float* weight_offset;  // [out_features, groups] or null
  const float* bias;           // [out_features] or null
  const int32_t* quant_bias;   // [out_features] or null
  int64_t in_features, out_features, groups;
  void* y;  // [tokens, out_features] of type `dtype`
  Dtype dtype;
};

// Memory that this thread keeps for kernels, aligned to 64 bytes. Not for code that calls kernels.
void* thread_scratch(int64_t bytes);

// Tokens that one call of a Gemm takes at most; bounds its stack and what a thread's caches must hold.
inline constexpr int64_t kMaxGemmTokens = 256;

struct Gemm {
  // Tiles of 16 output features [tile_begin, tile_end) for panels [panel_begin, panel_end).
  void (*run)(const GemmArgs&, int64_t tile_begin, int64_t tile_end, int64_t panel_begin, int64_t panel_end);
  int64_t panel_tokens, panel_unit;  // see Panels
  // Another Gemm that is faster for many_tokens or more, or null. It takes only groups that are whole units.
  const Gemm* for_many = nullptr;
  int64_t many_tokens = 0;

  const Gemm& choose(int64_t tokens, int64_t in_features, int64_t groups) const {
    const bool is_many = for_many != nullptr && tokens >= many_tokens;
    return is_many && (groups == 1 || in_features / groups % for_many->panel_unit == 0) ? *for_many : *this;
  }
};

// Bytes after the last panel that a Gemm may read, whatever they are: a tile of 16 rows of a shorter panel.
inline constexpr int64_t kPanelSlack = 16 * kTokenAlignment;

// The product with activations that stay floats, in float32:
//
//   y[t][o] = sum_g weight_scale[o][g] * sum_{k in g} x[t][k] * (w[o][k] - weight_offset[o][g]) + bias[o]
struct WeightOnlyArgs {
  const float* x;  // [tokens, in_features]
  int64_t tokens;  // at most kWeightOnlyTokens
  bool is_int4;    // otherwise int8
  const void* packed;
  const float* weight_scale;   // [out_features, groups]
  const float* weight_offset;  // [out_features, groups] or null
  const float* bias;           // [out_features] or null
  int64_t in_features, out_features, groups;
  void* y;  // [tokens, out_features] of type `dtype`
  Dtype dtype;
};

inline constexpr int64_t kWeightOnlyTokens = 64;

struct Kernels {
  const char* name;
  bool (*is_available)();
  // Tokens [begin, end); `scratch` holds transform_scratch() floats.
  void (*quantize)(const QuantizeArgs&, int64_t begin, int64_t end, float* scratch);
  // The same for one token in steps that threads can share. Columns [begin, end) of X', multiples of kTransformPadding,
  // into z [left, padded_right] by way of a thread's own scratch; returns the bits of their largest magnitude.
  int32_t (*transform_columns)(const QuantizeArgs&, int64_t token, int64_t begin, int64_t end, float* scratch,
                               float* z);
  // Rows [begin, end) of q from those of z and the bits of max|X'|; rows from 0 on set the scale too.
  void (*quantize_rows)(const QuantizeArgs&, int64_t token, int64_t begin, int64_t end, int32_t largest,
                        const float* z);
  // q_sums, if they are wanted.
  void (*sum_groups)(const QuantizeArgs&, int64_t token);
  // y[i] = silu(gate[i]) * up[i]; what is not finite stays not finite.
  void (*silu_and_mul)(const float* gate, const float* up, int64_t count, float* y);
  // The same for values of type `dtype`, computed in float32.
  void (*silu_and_mul_of)(const void* gate, const void* up, Dtype dtype, int64_t count, void* y);
  // Token `token` of NormArgs; y is [features] of their type, `scratch` holds norm_scratch() floats.
  void (*rms_norm)(const NormArgs&, int64_t token, float* scratch, void* y);
  // int4 weights with activations in [-8, 7], int8 weights with activations in [-127, 127].
  Gemm int4, int8;
  // The same with activations over the whole range of int8.
  Gemm wide_int4, wide_int8;
  // Tiles of 16 output features [tile_begin, tile_end).
  void (*weight_only)(const WeightOnlyArgs&, int64_t tile_begin, int64_t tile_end);
};

// Every instruction set compiled in, best first; the last one runs anywhere.
const std::vector<const Kernels*>& all_kernels();

// The set that VLLM_W4A4_ISA names, else the best available one. Chosen once.
// Throws std::runtime_error, listing what there is, if VLLM_W4A4_ISA names an unknown or unavailable one.
const Kernels& kernels();

// Throws like kernels(). An empty name means the best available one.
const Kernels& find_kernels(const std::string& name);

}  // namespace w4a4
