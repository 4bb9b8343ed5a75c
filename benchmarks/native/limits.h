// SPDX-License-Identifier: Apache-2.0
// What this CPU can do at best. One source file per instruction set includes this and defines the int8 step. Each
// function runs on one thread; the peaks access no memory and return the number of multiply-adds.
#pragma once

#include <cstdint>

#include "vector.h"

namespace w4a4 {
namespace {

constexpr int kChains = 12;  // sums in registers, enough to hide the latency of what is added to them

// The sum of all words. Prefetches as far ahead as the kernels do, so that they cannot read faster than this.
inline uint64_t read(const uint64_t* words, int64_t count) {
  typedef uint64_t Words __attribute__((vector_size(W4A4_VECTOR_FLOATS * 4), aligned(8), may_alias));
  constexpr int64_t kWords = kVector / 2, kLine = 8;
  Words sums[kLine / kWords] = {};
  int64_t i = 0;
  for (; i + kLine <= count; i += kLine) {
    __builtin_prefetch(words + i + 512);
    unrolled<kLine / kWords>([&](auto v)
                                 W4A4_INLINE { sums[v] += *reinterpret_cast<const Words*>(words + i + v * kWords); });
  }
  uint64_t sum = 0;
  for (; i < count; ++i) sum += words[i];
  for (const Words& part : sums) {
    for (int64_t j = 0; j < kWords; ++j) sum += part[j];
  }
  return sum;
}

// float32: kChains x kVector fused multiply-adds per step.
inline int64_t fma_peak(int64_t steps) {
  FloatVector sum[kChains] = {};
  const FloatVector factor = pinned(broadcast(0.5f));
  for (int64_t i = 0; i < steps; ++i) {
    unrolled<kChains>([&](auto c) W4A4_INLINE { sum[c] = pinned(sum[c] * factor + factor); });
  }
  return steps * kChains * kVector;
}

// Step(sum, weights, activations) adds Step::kProducts products to a vector of sums.
template <class Step>
int64_t dot_peak(int64_t steps) {
  using V = typename Step::Vector;
  V sum[kChains] = {};
  V weights = pinned(V{} + 3), activations = pinned(V{} + 5);
  for (int64_t i = 0; i < steps; ++i) {
    unrolled<kChains>([&](auto c) W4A4_INLINE { sum[c] = Step::add(sum[c], weights, activations); });
  }
  return steps * kChains * Step::kProducts;
}

}  // namespace
}  // namespace w4a4
