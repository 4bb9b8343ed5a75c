// SPDX-License-Identifier: Apache-2.0
// Float vectors of W4A4_VECTOR_FLOATS lanes and the conversions around them, with internal linkage: every source file
// compiles its own copy with its own instruction set.
#pragma once

#ifndef W4A4_VECTOR_FLOATS
#error "define W4A4_VECTOR_FLOATS before including vector.h"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "float16.h"
#include "kernels.h"

namespace w4a4 {
namespace {

constexpr int64_t kVector = W4A4_VECTOR_FLOATS;
static_assert(kTransformPadding % kVector == 0);

typedef float FloatVector __attribute__((vector_size(W4A4_VECTOR_FLOATS * 4), may_alias));
typedef int32_t IntVector __attribute__((vector_size(W4A4_VECTOR_FLOATS * 4), may_alias));
typedef uint32_t WordVector __attribute__((vector_size(W4A4_VECTOR_FLOATS * 4), may_alias));
typedef uint16_t HalfVector __attribute__((vector_size(W4A4_VECTOR_FLOATS * 2), may_alias));
typedef int8_t ByteVector __attribute__((vector_size(W4A4_VECTOR_FLOATS), may_alias));

inline FloatVector load(const float* p) {
  FloatVector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, FloatVector v) { std::memcpy(p, &v, sizeof v); }
// a - 0, which GCC knows to be a; 0 + a would cost an addition, because it is not -0 for a = -0.
inline FloatVector broadcast(float a) { return a - FloatVector{}; }
inline FloatVector min(FloatVector a, FloatVector b) { return a < b ? a : b; }
inline FloatVector max(FloatVector a, FloatVector b) { return a > b ? a : b; }

#define W4A4_INLINE __attribute__((always_inline))
// For inner loops that need every register: inlined, they share them with constants of their callers.
#define W4A4_NOINLINE __attribute__((noinline))

// f(0), ..., f(N - 1) with constants: arrays indexed by them live in registers, which GCC does not achieve for loops
// that it unrolls itself (it scalarizes arrays before it unrolls).
template <int N, class F>
W4A4_INLINE inline void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      W4A4_INLINE { (f(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

// Calls f with `value`, in [1, Max], as a constant.
template <int Max, class F>
void with_constant(int64_t value, const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (void)((value == I + 1 && (f(std::integral_constant<int, I + 1>{}), true)) || ...);
  }(std::make_integer_sequence<int, Max>{});
}

// Ends the computation of a value here. Without it GCC moves the loads of a whole unrolled step before its arithmetic
// and spills accumulators.
template <class V>
W4A4_INLINE inline V pinned(V v) {
#if defined(W4A4_SIMDE)  // emulated vectors are not registers
#elif defined(__x86_64__)
  asm volatile("" : "+v"(v));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#endif
  return v;
}

constexpr int32_t kInfinityBits = 0x7F800000;

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// `count` values of type `dtype` at `source`, as floats.
inline void load_floats(const void* source, Dtype dtype, int64_t count, float* target) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(target, source, count * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    const auto* values = static_cast<const uint16_t*>(source);
    for (int64_t i = 0; i < count; ++i) target[i] = bits_to_float(static_cast<uint32_t>(values[i]) << 16);
  } else {
    const auto* values = static_cast<const Float16*>(source);
    for (int64_t i = 0; i < count; ++i) target[i] = static_cast<float>(values[i]);
  }
}

// `count` floats written as type `dtype`, rounded to nearest even.
inline void store_floats(const float* source, int64_t count, Dtype dtype, void* target) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(target, source, count * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    auto* values = static_cast<uint16_t*>(target);
    for (int64_t i = 0; i < count; ++i) values[i] = to_bfloat16(source[i]);
  } else {
    auto* values = static_cast<Float16*>(target);
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<Float16>(source[i]);
  }
}

// The same for one vector.
W4A4_INLINE inline void store_vector(FloatVector v, Dtype dtype, void* target) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(target, &v, sizeof v);
  } else if (dtype == Dtype::kBFloat16) {
    WordVector bits;
    std::memcpy(&bits, &v, sizeof bits);
    const WordVector rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16, quiet_nan = bits >> 16 | 0x40;
    const HalfVector halves = __builtin_convertvector(v == v ? rounded : quiet_nan, HalfVector);
    std::memcpy(target, &halves, sizeof halves);
  } else {
    Float16 halves[kVector];
    for (int64_t i = 0; i < kVector; ++i) halves[i] = static_cast<Float16>(v[i]);
    std::memcpy(target, halves, sizeof halves);
  }
}

// A vector of values of type `dtype`, as floats.
W4A4_INLINE inline FloatVector load_vector(const void* source, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return load(static_cast<const float*>(source));
  FloatVector v;
  if (dtype == Dtype::kBFloat16) {
    HalfVector halves;
    std::memcpy(&halves, source, sizeof halves);
    const WordVector bits = __builtin_convertvector(halves, WordVector) << 16;
    std::memcpy(&v, &bits, sizeof v);
  } else {
    Float16 halves[kVector];
    std::memcpy(halves, source, sizeof halves);
    for (int64_t i = 0; i < kVector; ++i) v[i] = static_cast<float>(halves[i]);
  }
  return v;
}

// store_floats, a vector at a time.
inline void store_rounded(const float* source, int64_t count, Dtype dtype, char* target) {
  int64_t i = 0;
  for (; i + kVector <= count; i += kVector) store_vector(load(source + i), dtype, target + i * dtype_size(dtype));
  store_floats(source + i, count - i, dtype, target + i * dtype_size(dtype));
}

// The bits of |value|, for which the next function's order holds.
inline int32_t magnitude_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7FFFFFFF;
}

// The bits of the largest magnitude; `count` is a multiple of kVector. As integers, the bits of floats without their
// sign are ordered as the magnitudes are, infinity above all finite ones and NaN above infinity: nothing that is not
// finite gets lost, as it would in a comparison of floats.
inline int32_t max_magnitude_bits(const float* values, int64_t count) {
  IntVector largest{};
  for (int64_t i = 0; i < count; i += kVector) {
    IntVector bits;
    std::memcpy(&bits, values + i, sizeof bits);
    bits &= 0x7FFFFFFF;
    largest = largest > bits ? largest : bits;
  }
  int32_t result = 0;
  for (int64_t i = 0; i < kVector; ++i) result = largest[i] > result ? largest[i] : result;
  return result;
}

// clamp(round_half_even(values / scale), q_min, q_max) of finite values. A true division: a reciprocal would move ties.
inline void quantize_floats(const float* values, int64_t count, float scale, float q_min, float q_max, int8_t* q) {
  // Adding and subtracting 1.5 * 2^23 rounds to nearest even, exact while |value / scale| < 2^22; clamping first
  // keeps it there.
  const FloatVector magic = broadcast(12582912.0f), low = broadcast(q_min), high = broadcast(q_max);
  const FloatVector divisor = broadcast(scale);
  const auto quantized = [&](FloatVector v) W4A4_INLINE {
    const FloatVector ratio = max(low, min(high, v / divisor));
    return __builtin_convertvector(__builtin_convertvector((ratio + magic) - magic, IntVector), ByteVector);
  };
  int64_t i = 0;
  for (; i + kVector <= count; i += kVector) {
    const ByteVector bytes = quantized(load(values + i));
    std::memcpy(q + i, &bytes, sizeof bytes);
  }
  if (i < count) {
    FloatVector rest{};
    std::memcpy(&rest, values + i, (count - i) * sizeof(float));
    const ByteVector bytes = quantized(rest);
    std::memcpy(q + i, &bytes, count - i);
  }
}

inline int32_t sum_bytes(const int8_t* values, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

}  // namespace
}  // namespace w4a4
