// SPDX-License-Identifier: Apache-2.0
// RMSNorm of one token. Include it in one source file per instruction set, as transform_impl.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "vector.h"

namespace w4a4 {
namespace {

void rms_norm(const NormArgs& args, int64_t token, float* scratch, void* y) {
  const int64_t count = args.features, padded = padded_features(count);
  const int64_t row = token * count * dtype_size(args.dtype);
  float *sum = scratch, *other = scratch + padded;
  std::memset(sum + count, 0, (padded - count) * sizeof(float));
  std::memset(other + count, 0, (padded - count) * sizeof(float));
  load_floats(static_cast<const char*>(args.x) + row, args.dtype, count, sum);
  if (args.residual != nullptr) {
    char* residual = static_cast<char*>(args.residual) + row;
    load_floats(residual, args.dtype, count, other);
    for (int64_t i = 0; i < padded; i += kVector) store(sum + i, load(sum + i) + load(other + i));
    store_rounded(sum, count, args.dtype, residual);
  }
  FloatVector squares{};
  for (int64_t i = 0; i < padded; i += kVector) squares += load(sum + i) * load(sum + i);
  float total = 0.0f;
  for (int64_t i = 0; i < kVector; ++i) total += squares[i];
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(count) + args.epsilon);
  load_floats(args.weight, args.dtype, count, other);
  for (int64_t i = 0; i < padded; i += kVector) {
    store(sum + i, load(sum + i) * broadcast(factor) * load(other + i));
  }
  store_rounded(sum, count, args.dtype, static_cast<char*>(y));
}

}  // namespace

// Defines `Kernels::rms_norm` for one instruction set.
#define W4A4_DEFINE_NORM(isa)                                                         \
  void rms_norm_##isa(const NormArgs& args, int64_t token, float* scratch, void* y) { \
    rms_norm(args, token, scratch, y);                                                \
  }

}  // namespace w4a4
