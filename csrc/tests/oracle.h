// SPDX-License-Identifier: Apache-2.0
// The operators' arithmetic written out in double precision, independent of the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

struct Quantized {
  std::vector<int8_t> q;
  std::vector<double> scale;
};

// X' = L^T (X R) for each token; an empty factor is the identity.
inline std::vector<double> transform(const std::vector<float>& x, int64_t tokens, int64_t left, int64_t right,
                                     const std::vector<float>& l, const std::vector<float>& r) {
  std::vector<double> out(x.begin(), x.end());
  for (int64_t t = 0; t < tokens; ++t) {
    double* token = out.data() + t * left * right;
    std::vector<double> y(left * right), z(left * right);
    for (int64_t m = 0; m < left; ++m) {
      for (int64_t n = 0; n < right; ++n) {
        for (int64_t k = 0; k < right; ++k) {
          y[m * right + n] += token[m * right + k] * (r.empty() ? k == n : r[k * right + n]);
        }
      }
    }
    for (int64_t m = 0; m < left; ++m) {
      for (int64_t n = 0; n < right; ++n) {
        for (int64_t k = 0; k < left; ++k)
          z[m * right + n] += (l.empty() ? k == m : l[k * left + m]) * y[k * right + n];
      }
    }
    std::copy(z.begin(), z.end(), token);
  }
  return out;
}

inline Quantized quantize(const std::vector<double>& x, int64_t tokens, double clip, double q_min, double q_max) {
  Quantized result{std::vector<int8_t>(x.size()), std::vector<double>(tokens)};
  const int64_t features = tokens > 0 ? static_cast<int64_t>(x.size()) / tokens : 0;
  for (int64_t t = 0; t < tokens; ++t) {
    double largest = 0;
    for (int64_t k = 0; k < features; ++k) largest = std::max(largest, std::fabs(x[t * features + k]));
    result.scale[t] = clip * largest / q_max;
    for (int64_t k = 0; k < features && largest > 0; ++k) {
      const double rounded = std::nearbyint(x[t * features + k] / result.scale[t]);
      result.q[t * features + k] = static_cast<int8_t>(std::clamp(rounded, q_min, q_max));
    }
  }
  return result;
}

// The same with the scale rounded to float32, for values at the ends of its range. A scale that rounds to 0 gives q 0.
inline Quantized quantize_float32(const std::vector<float>& x, int64_t tokens, double q_min, double q_max) {
  Quantized result{std::vector<int8_t>(x.size()), std::vector<double>(tokens)};
  const int64_t features = static_cast<int64_t>(x.size()) / tokens;
  for (int64_t t = 0; t < tokens; ++t) {
    double largest = 0;
    for (int64_t k = 0; k < features; ++k) largest = std::max(largest, std::fabs(double{x[t * features + k]}));
    const double scale = static_cast<float>(largest / q_max);
    for (int64_t k = 0; k < features && scale > 0; ++k) {
      const double rounded = std::nearbyint(static_cast<float>(x[t * features + k] / scale));
      result.q[t * features + k] = static_cast<int8_t>(std::clamp(rounded, q_min, q_max));
    }
    result.scale[t] = scale;
  }
  return result;
}

// sum_k q[t][k] * w[o][k] over group g.
inline int64_t dot(const std::vector<int8_t>& q, const std::vector<int8_t>& w, int64_t t, int64_t o, int64_t features,
                   int64_t g, int64_t groups) {
  int64_t sum = 0;
  const int64_t size = features / groups;
  for (int64_t k = g * size; k < (g + 1) * size; ++k) sum += q[t * features + k] * w[o * features + k];
  return sum;
}
