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

// The first `size` of kVector values at `source`, and zeros.
template <Dtype dtype>
W4A4_INLINE inline FloatVector load_some(const char* source, int64_t size) {
  if (size == kVector) return load_vector(source, dtype);
  float values[kVector] = {};
  load_floats(source, dtype, size, values);
  return load(values);
}

template <Dtype dtype>
W4A4_INLINE inline void store_some(FloatVector v, int64_t size, char* target) {
  if (size == kVector) return store_vector(v, dtype, target);
  float values[kVector];
  store(values, v);
  store_floats(values, size, dtype, target);
}

// body(i, size) for each vector of `count` values; the last may be shorter.
template <class F>
W4A4_INLINE inline void for_vectors(int64_t count, const F& body) {
  int64_t i = 0;
  for (; i + kVector <= count; i += kVector) body(i, kVector);
  if (i < count) body(i, count - i);
}

template <Dtype dtype>
void rms_norm_of(const NormArgs& args, int64_t token, float* sums, char* y) {
  constexpr int64_t kBytes = dtype_size(dtype);
  const int64_t count = args.features;
  const char* x = static_cast<const char*>(args.x) + token * count * kBytes;
  const auto* weight = static_cast<const char*>(args.weight);
  FloatVector squares{};
  if (args.residual == nullptr) {
    for_vectors(count, [&](int64_t i, int64_t size) W4A4_INLINE {
      const FloatVector sum = load_some<dtype>(x + i * kBytes, size);
      store(sums + i, sum);
      squares += sum * sum;
    });
  } else {
    char* residual = static_cast<char*>(args.residual) + token * count * kBytes;
    for_vectors(count, [&](int64_t i, int64_t size) W4A4_INLINE {
      const FloatVector sum = load_some<dtype>(x + i * kBytes, size) + load_some<dtype>(residual + i * kBytes, size);
      store(sums + i, sum);
      store_some<dtype>(sum, size, residual + i * kBytes);
      squares += sum * sum;
    });
  }
  float total = 0.0f;
  for (int64_t i = 0; i < kVector; ++i) total += squares[i];
  const FloatVector factor = broadcast(1.0f / std::sqrt(total / static_cast<float>(count) + args.epsilon));
  for_vectors(count, [&](int64_t i, int64_t size) W4A4_INLINE {
    const FloatVector scaled = load(sums + i) * factor * load_some<dtype>(weight + i * kBytes, size);
    store_some<dtype>(scaled, size, y + i * kBytes);
  });
}

void rms_norm(const NormArgs& args, int64_t token, float* scratch, void* y) {
  auto* target = static_cast<char*>(y);
  if (args.dtype == Dtype::kFloat32) {
    rms_norm_of<Dtype::kFloat32>(args, token, scratch, target);
  } else if (args.dtype == Dtype::kBFloat16) {
    rms_norm_of<Dtype::kBFloat16>(args, token, scratch, target);
  } else {
    rms_norm_of<Dtype::kFloat16>(args, token, scratch, target);
  }
}

}  // namespace

// Defines `Kernels::rms_norm` for one instruction set.
#define W4A4_DEFINE_NORM(isa)                                                         \
  void rms_norm_##isa(const NormArgs& args, int64_t token, float* scratch, void* y) { \
    rms_norm(args, token, scratch, y);                                                \
  }

}  // namespace w4a4
