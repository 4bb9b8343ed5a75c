// SPDX-License-Identifier: Apache-2.0
// What this CPU can do at best, measured without memory: one source file per instruction set includes this and defines
// the int8 step. Each function runs on one thread and returns the multiply-adds it has done.
#pragma once

#include <cstdint>

#include "vector.h"

namespace w4a4 {
namespace {

constexpr int kChains = 12;  // sums in registers, enough to hide the latency of what is added to them

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
