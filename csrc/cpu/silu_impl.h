// SPDX-License-Identifier: Apache-2.0
// The activation between gate and up and down. Include it in one source file per instruction set, as
// transform_impl.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "vector.h"

namespace w4a4 {
namespace {

// exp(x) to about 2 units in the last place; infinite from x = 88.4 on, about 1e-38 below -87. NaN stays NaN.
inline FloatVector exp_of(FloatVector x) {
  // x = n ln 2 + r with |r| <= ln(2) / 2, and exp(r) by its Taylor series. Adding 1.5 * 2^23 rounds to the integer n
  // and leaves it in the low bits; ln 2 is subtracted in two parts, the first with zeros at its end, so that n times it
  // is exact.
  const FloatVector magic = broadcast(12582912.0f);
  x = max(broadcast(-87.0f), min(broadcast(89.0f), x));
  const FloatVector shifted = x * broadcast(0x1.715476p+0f) + magic;
  const FloatVector n = shifted - magic;
  const FloatVector r = (x - n * broadcast(0x1.62e4p-1f)) - n * broadcast(0x1.7f7d1cp-20f);
  FloatVector series = broadcast(1.0f / 5040.0f);
  for (const float coefficient : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) {
    series = series * r + broadcast(coefficient);
  }
  IntVector bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  FloatVector power;
  std::memcpy(&power, &bits, sizeof power);
  return series * power;
}

void silu_and_mul(const float* gate, const float* up, int64_t count, float* y) {
  const auto one_vector = [](const float* g, const float* u, float* target) {
    const FloatVector x = load(g);
    store(target, x / (broadcast(1.0f) + exp_of(-x)) * load(u));
  };
  int64_t i = 0;
  for (; i + kVector <= count; i += kVector) one_vector(gate + i, up + i, y + i);
  if (i == count) return;
  float rest[3][kVector] = {};
  std::memcpy(rest[0], gate + i, (count - i) * sizeof(float));
  std::memcpy(rest[1], up + i, (count - i) * sizeof(float));
  one_vector(rest[0], rest[1], rest[2]);
  std::memcpy(y + i, rest[2], (count - i) * sizeof(float));
}

void silu_and_mul_of(const void* gate, const void* up, Dtype dtype, int64_t count, void* y) {
  // Features that are computed at a time: their floats stay in the first-level cache.
  constexpr int64_t kPiece = 1024;
  alignas(64) float gates[kPiece], ups[kPiece];
  const int64_t size = dtype_size(dtype);
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t piece = std::min(kPiece, count - begin);
    load_floats(static_cast<const char*>(gate) + begin * size, dtype, piece, gates);
    load_floats(static_cast<const char*>(up) + begin * size, dtype, piece, ups);
    silu_and_mul(gates, ups, piece, gates);
    store_rounded(gates, piece, dtype, static_cast<char*>(y) + begin * size);
  }
}

}  // namespace

// Defines the two functions of `Kernels` for one instruction set.
#define W4A4_DEFINE_SILU(isa)                                                                         \
  void silu_and_mul_##isa(const float* gate, const float* up, int64_t count, float* y) {              \
    silu_and_mul(gate, up, count, y);                                                                 \
  }                                                                                                   \
  void silu_and_mul_of_##isa(const void* gate, const void* up, Dtype dtype, int64_t count, void* y) { \
    silu_and_mul_of(gate, up, dtype, count, y);                                                       \
  }

}  // namespace w4a4
