// SPDX-License-Identifier: Apache-2.0
// What the kernels must compute, written from the formulas and sharing no code with them. Sums are taken in double or
// int64, where they are exact; each float32 operation of the contract is one float operation here. Compile without
// contraction (-ffp-contract=off).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "linear.h"

struct Quantized16 {
  std::vector<int8_t> q;     // [tokens][in]
  std::vector<float> scale;  // [tokens]
};

// How X R is rounded to the dtype if a product with L follows it.
enum class ProductRounding { kNearestEven, kNearestAway, kTowardsZero, kNone };

inline double rounded_product(Dtype dtype, double value, ProductRounding rounding) {
  if (rounding == ProductRounding::kNone) return value;
  const double nearest = from_bits(dtype, to_bits(dtype, static_cast<float>(value)));
  if (rounding == ProductRounding::kNearestEven || nearest == value || value == 0) return nearest;
  // The neighbours are 2^-fraction bits of the value's power of two apart.
  const double unit = std::ldexp(1.0, std::ilogb(value) - (dtype == Dtype::kHalf ? 10 : 7));
  const double magnitude = std::fabs(value) / unit;
  const double whole = rounding == ProductRounding::kTowardsZero ? std::floor(magnitude) : std::floor(magnitude + 0.5);
  return std::copysign(whole * unit, value);
}

// X' = L^T (X R); the result as float32.
inline std::vector<float> reference_transform(const Linear16& linear,
                                              ProductRounding rounding = ProductRounding::kNearestEven) {
  const int64_t left = linear.left_size(), right = linear.right_size(), size = left * right;
  std::vector<float> result(linear.x.size());
  std::vector<double> x(size), y(size), l(left * left), r(right * right);
  for (size_t i = 0; i < linear.left.size(); ++i) l[i] = from_bits(linear.dtype, linear.left[i]);
  for (size_t i = 0; i < linear.right.size(); ++i) r[i] = from_bits(linear.dtype, linear.right[i]);
  for (int64_t t = 0; t < linear.shape.tokens; ++t) {
    for (int64_t i = 0; i < size; ++i) x[i] = from_bits(linear.dtype, linear.x[t * size + i]);
    y = x;
    if (!linear.right.empty()) {
      std::fill(y.begin(), y.end(), 0.0);
      for (int64_t m = 0; m < left; ++m) {
        for (int64_t k = 0; k < right; ++k) {
          for (int64_t n = 0; n < right; ++n) y[m * right + n] += x[m * right + k] * r[k * right + n];
        }
      }
      if (!linear.left.empty()) {
        for (double& value : y) value = rounded_product(linear.dtype, value, rounding);
      }
    }
    x = y;
    if (!linear.left.empty()) {
      std::fill(x.begin(), x.end(), 0.0);
      for (int64_t k = 0; k < left; ++k) {
        for (int64_t m = 0; m < left; ++m) {
          for (int64_t n = 0; n < right; ++n) x[m * right + n] += l[k * left + m] * y[k * right + n];
        }
      }
    }
    for (int64_t i = 0; i < size; ++i) result[t * size + i] = static_cast<float>(x[i]);
  }
  return result;
}

// scale = (clip / 7) max|z|; q = rint(z ((7 / clip) / max|z|)) in [-8, 7].
inline Quantized16 reference_quantize(const Linear16& linear, const std::vector<float>& z) {
  const int64_t size = linear.shape.in_features;
  Quantized16 result{std::vector<int8_t>(z.size()), std::vector<float>(linear.shape.tokens)};
  const float scale_factor = linear.shape.clip_ratio / 7.0f, inverse_factor = 7.0f / linear.shape.clip_ratio;
  for (int64_t t = 0; t < linear.shape.tokens; ++t) {
    float largest = 0;
    for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::fabs(z[t * size + i]));
    result.scale[t] = largest * scale_factor;
    if (largest == 0) continue;
    const float inverse = inverse_factor / std::max(largest, std::ldexp(1.0f, -100));
    for (int64_t i = 0; i < size; ++i) {
      const float scaled = z[t * size + i] * inverse;
      result.q[t * size + i] = static_cast<int8_t>(std::clamp(std::nearbyint(scaled), -8.0f, 7.0f));
    }
  }
  return result;
}

// y = scale * sum_g weight_scale[g] * (exact integer sum of group g) + bias, float32 in this order, rounded to the
// dtype.
inline std::vector<uint16_t> reference_multiply(const Linear16& linear, const Quantized16& activations) {
  const int64_t in = linear.shape.in_features, out = linear.shape.out_features, groups = linear.shape.groups;
  std::vector<uint16_t> y(linear.shape.tokens * out);
  for (int64_t t = 0; t < linear.shape.tokens; ++t) {
    for (int64_t o = 0; o < out; ++o) {
      float sum = 0;
      for (int64_t g = 0; g < groups; ++g) {
        int64_t integer = 0;
        const int8_t* q = &activations.q[t * in];
        const int8_t* w = &linear.weight[o * in];
        for (int64_t k = g * (in / groups); k < (g + 1) * (in / groups); ++k) integer += q[k] * w[k];
        const float product = static_cast<float>(integer) * linear.weight_scale[g * out + o];
        sum = g == 0 ? product : sum + product;
      }
      sum = sum * activations.scale[t];
      if (!linear.bias.empty()) sum = sum + linear.bias[o];
      // What float16 cannot hold saturates, as the conversion's document says.
      if (linear.dtype == Dtype::kHalf) sum = std::clamp(sum, -65504.0f, 65504.0f);
      y[t * out + o] = to_bits(linear.dtype, sum);
    }
  }
  return y;
}
