// SPDX-License-Identifier: Apache-2.0
// Random operands, the same on every machine (std::*_distribution differ between standard libraries).
#pragma once

#include <cstdint>
#include <random>
#include <vector>

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}

  int64_t integer(int64_t low, int64_t high) { return low + static_cast<int64_t>(engine_() % (high - low + 1)); }
  float real(float low, float high) { return low + (high - low) * static_cast<float>(engine_() % 65536) / 65536.0f; }

  std::vector<int8_t> bytes(int64_t count, int low, int high) {
    std::vector<int8_t> values(count);
    for (auto& value : values) value = static_cast<int8_t>(integer(low, high));
    return values;
  }
  std::vector<float> reals(int64_t count, float low, float high) {
    std::vector<float> values(count);
    for (auto& value : values) value = real(low, high);
    return values;
  }

 private:
  std::mt19937 engine_;
};
