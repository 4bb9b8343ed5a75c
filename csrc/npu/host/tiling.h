// SPDX-License-Identifier: Apache-2.0
// How a linear is divided for the NPU: a pure function of its shape and the number of cores. No CANN, no torch.
#pragma once

#include <cstdint>
#include <string>

#include "../kernels/tiling_data.h"

namespace w4a4::npu {

// A W4A4 linear. `left`, `right` are the sizes of the Kronecker factors, 0 where a factor is missing; the other size
// then follows from in_features.
struct LinearShape {
  int64_t tokens = 0;
  int64_t in_features = 0;
  int64_t out_features = 0;
  int64_t left = 0;
  int64_t right = 0;
  int64_t groups = 1;
  bool has_bias = false;
  float clip_ratio = 1.0f;
};

struct Tiling {
  TilingData data{};
  Factors factors = Factors::kNone;
  TokenClass token_class = TokenClass::kRows16;
  uint32_t cores = 0;  // AICs to launch; each has two AIVs
  uint64_t workspace_bytes = 0;
  std::string error;  // not empty: the shape is not supported, in words for the user

  bool ok() const { return error.empty(); }
};

// Whether the next chunk of tokens is transformed between the tiles of this one. kAlways, for tests, is an error where
// that is impossible: a single chunk of tokens, few features, no transform.
enum class Pipelining { kIfFaster, kAlways };

// `cores`: AICs of the device (24 on 910B1/B2 and an A3 die, 20 on 910B3).
Tiling make_tiling(const LinearShape& shape, uint32_t cores, Pipelining pipelining = Pipelining::kIfFaster);

// The clip ratio is the only property of a linear that its tiling depends on in nothing but two values.
inline bool is_clip_ratio(float value) { return value > 0.0f && value <= 1.0f; }
inline void set_clip_ratio(float value, TilingData& data) {
  data.scale_factor = value / 7.0f;
  data.inverse_factor = 7.0f / value;
}

// The same with the tokens shared among the cores, for separate launches of transform and GEMM.
Tiling share_activations(const Tiling& tiling);

// How long one core takes to transform one token, and how long a grid barrier takes, in microseconds; they decide
// `replicated`. Estimates from published transfer rates, not measurements.
double transform_microseconds(const LinearShape& shape);
inline constexpr double kBarrierMicroseconds = 2.0;

}  // namespace w4a4::npu
