// SPDX-License-Identifier: Apache-2.0
// The linears of the models that the kernels are built for.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

struct Model {
  const char* name;
  int64_t hidden, intermediate, heads, kv_heads, head_dim;
};

inline const std::vector<Model>& models() {
  static const std::vector<Model> all = {
      {"Qwen3-0.6B", 1024, 3072, 16, 8, 128},  {"Qwen3-1.7B", 2048, 6144, 16, 8, 128},
      {"Qwen3-4B", 2560, 9728, 32, 8, 128},    {"Qwen3-8B", 4096, 12288, 32, 8, 128},
      {"Qwen3-14B", 5120, 17408, 40, 8, 128},  {"Qwen3-32B", 5120, 25600, 64, 8, 128},
      {"Llama-3-8B", 4096, 14336, 32, 8, 128}, {"Llama-3-70B", 8192, 28672, 64, 8, 128},
  };
  return all;
}

// The sizes of the Kronecker factors as the quantizer chooses them: the smallest a >= sqrt(n) with a*a - n a square b*b
// gives a - b and a + b.
inline std::pair<int64_t, int64_t> factor_sizes(int64_t n) {
  for (int64_t a = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(n))));; ++a) {
    const int64_t b = std::llround(std::sqrt(static_cast<double>(a * a - n)));
    if (b * b == a * a - n) return {a - b, a + b};
  }
}

struct Linear {
  std::string name;
  int64_t in, out, left, right;  // left, right: 0 where there is no factor
};

// What one rank computes. The transform of a row-parallel linear (o, down) mixes all features, so under tensor
// parallelism it is a launch of its own, and the GEMM sees the rank's part of the features.
inline std::vector<Linear> linears(const Model& m, int64_t tp) {
  const auto [hl, hr] = factor_sizes(m.hidden);
  const auto [il, ir] = factor_sizes(m.intermediate);
  const int64_t kv_heads = m.kv_heads >= tp ? m.kv_heads / tp : 1;
  const std::string suffix = " TP" + std::to_string(tp);
  std::vector<Linear> all = {
      {std::string(m.name) + " qkv" + suffix, m.hidden, (m.heads / tp + 2 * kv_heads) * m.head_dim, hl, hr},
      {std::string(m.name) + " gate_up" + suffix, m.hidden, 2 * m.intermediate / tp, hl, hr},
  };
  const int64_t attention = m.heads * m.head_dim;
  if (tp == 1) {
    all.push_back({std::string(m.name) + " o" + suffix, attention, m.hidden, m.heads, 0});
    all.push_back({std::string(m.name) + " down" + suffix, m.intermediate, m.hidden, il, ir});
  } else {
    all.push_back({std::string(m.name) + " o" + suffix, attention / tp, m.hidden, 0, 0});
    all.push_back({std::string(m.name) + " down" + suffix, m.intermediate / tp, m.hidden, 0, 0});
  }
  return all;
}
