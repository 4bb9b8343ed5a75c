// SPDX-License-Identifier: Apache-2.0
// A W4A4 linear with its operands as the kernels take them, and as numbers for the reference.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../../../tests/random.h"
#include "../../host/tiling.h"

enum class Dtype { kHalf, kBFloat16 };

// A 16-bit floating-point number as a float and back, rounded to nearest even.
inline float from_bits(Dtype dtype, uint16_t bits) {
  if (dtype == Dtype::kBFloat16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? std::nanf("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

inline uint16_t to_bits(Dtype dtype, float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return dtype == Dtype::kBFloat16 ? 0x7fc0 : 0x7e00;
  const bool is_half = dtype == Dtype::kHalf;
  const int fraction_bits = is_half ? 10 : 7, smallest = is_half ? -14 : -126, bias = is_half ? 15 : 127;
  const uint16_t infinity = is_half ? 0x7c00 : 0x7f80;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (std::isinf(value)) return sign | infinity;
  if (magnitude == 0) return sign;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  exponent = std::max(exponent - 1, smallest);
  // Units of the last place; nearbyint rounds halves to even.
  const double units = std::nearbyint(std::ldexp(magnitude, fraction_bits - exponent));
  const int64_t encoded = static_cast<int64_t>(units) + (int64_t{exponent + bias - 1} << fraction_bits);
  return sign | static_cast<uint16_t>(std::min<int64_t>(encoded, infinity));
}

struct Linear16 {
  w4a4::npu::LinearShape shape;
  Dtype dtype = Dtype::kBFloat16;
  std::vector<uint16_t> x, left, right;  // bits; the factors are empty where there is none
  std::vector<int8_t> weight;            // [out][in]
  std::vector<float> weight_scale;       // [groups][out]
  std::vector<float> bias;               // [out] or empty

  int64_t left_size() const { return shape.left ? shape.left : shape.right ? shape.in_features / shape.right : 1; }
  int64_t right_size() const { return shape.in_features / left_size(); }
  std::string text() const {
    return std::string(dtype == Dtype::kHalf ? "half " : "bfloat16 ") + std::to_string(shape.tokens) + " tokens, " +
           std::to_string(shape.in_features) + " = " + std::to_string(shape.left) + " x " +
           std::to_string(shape.right) + " -> " + std::to_string(shape.out_features) + ", " +
           std::to_string(shape.groups) + " groups, clip " + std::to_string(shape.clip_ratio) +
           (shape.has_bias ? ", bias" : "");
  }
};

// packed[in / 64][out / 16][16][32 bytes], even inputs in the low nibble; see vllm_w4a4_plugin/ops/npu/nz.py.
inline std::vector<uint8_t> pack_nz(const std::vector<int8_t>& weight, int64_t out, int64_t in) {
  const int64_t output_blocks = (out + 15) / 16, input_blocks = (in + 63) / 64;
  std::vector<uint8_t> packed(output_blocks * input_blocks * 512, 0);
  for (int64_t o = 0; o < out; ++o) {
    for (int64_t k = 0; k < in; ++k) {
      const int64_t byte = ((k / 64 * output_blocks + o / 16) * 16 + o % 16) * 32 + k % 64 / 2;
      packed[byte] |= static_cast<uint8_t>((weight[o * in + k] & 15) << (k % 2 * 4));
    }
  }
  return packed;
}

// What kind of values a random linear has.
enum class Values {
  kSmallIntegers,  // every sum of the transform is exact in float32, whatever its order
  kRealistic,      // tokens with outliers, factors near orthogonal
};

inline Linear16 random_linear(const w4a4::npu::LinearShape& shape, Dtype dtype, Values values, uint32_t seed) {
  Random random(seed);
  Linear16 linear;
  linear.shape = shape;
  linear.dtype = dtype;
  const int64_t left = linear.left_size(), right = linear.right_size();
  const bool exact = values == Values::kSmallIntegers;
  linear.x.resize(shape.tokens * shape.in_features);
  for (int64_t i = 0; i < static_cast<int64_t>(linear.x.size()); ++i) {
    const bool is_outlier = !exact && i % shape.in_features % 97 == 5;
    const float value = exact ? static_cast<float>(random.integer(-9, 9))
                              : (random.real(-1, 1) + random.real(-1, 1)) * (is_outlier ? 20.0f : 1.0f);
    linear.x[i] = to_bits(dtype, value);
  }
  // Rotations are stood in for by random matrices of the same scale: the reference inverts nothing.
  const auto factor = [&](int64_t size) {
    std::vector<uint16_t> bits(size * size);
    const float scale = std::sqrt(3.0f / size);
    for (auto& value : bits) {
      value = to_bits(dtype, exact ? static_cast<float>(random.integer(-2, 2)) : scale * random.real(-1, 1));
    }
    return bits;
  };
  if (shape.left) linear.left = factor(left);
  if (shape.right) linear.right = factor(right);
  linear.weight = random.bytes(shape.out_features * shape.in_features, -8, 7);
  linear.weight_scale = random.reals(shape.groups * shape.out_features, 0.001f, 0.02f);
  if (shape.has_bias) linear.bias = random.reals(shape.out_features, -2, 2);
  return linear;
}
