// SPDX-License-Identifier: Apache-2.0
// IEEE 754 half precision: the compiler's type where there is one, else conversions in software. Everything that is
// compiled has internal linkage: every source file has its own copy, for its own instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) && !defined(__FLT16_MAX__)
#include <immintrin.h>
#endif

namespace w4a4 {
namespace {

// Conversions by arithmetic on bits, exact for every value: to half, values are rounded to the nearest, ties to even.
// NaN stays NaN and becomes quiet, with the upper bits of its payload, as the instructions do it.
inline float half_bits_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7FFF;
  float value;
  uint32_t bits;
  if (magnitude >= 0x7C00) {  // infinity or NaN
    bits = 0x7F800000 | (magnitude & 0x3FF) << 13 | (magnitude > 0x7C00 ? 0x400000 : 0);
  } else if (magnitude >= 0x400) {
    bits = (magnitude << 13) + ((127 - 15) << 23);
  } else {  // zero or a denormal: a multiple of 2^-24, which is a normal float
    value = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t float_to_half_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00 | (magnitude >> 13 & 0x3FF));
  if (magnitude >= 0x477FF000) return sign | 0x7C00;  // 65520 and above round to infinity
  uint32_t kept, lost, half_step;                     // lost: the bits cut off; half_step: half of the last kept one
  if (magnitude >= 0x38800000) {                      // at least 2^-14: a normal half
    const uint32_t shifted = magnitude - ((127 - 15) << 23);
    kept = shifted >> 13, lost = shifted & 0x1FFF, half_step = 0x1000;
  } else if (magnitude >= 0x33000000) {  // at least 2^-25: a denormal half, or a tie with zero
    const uint32_t shift = 126 - (magnitude >> 23);
    const uint32_t significand = (magnitude & 0x7FFFFF) | 0x800000;
    kept = significand >> shift, lost = significand & ((1u << shift) - 1), half_step = 1u << (shift - 1);
  } else {
    return sign;
  }
  // A carry out of the significand goes into the exponent, which is what rounding up to the next power of two means.
  kept += lost > half_step || (lost == half_step && (kept & 1)) ? 1 : 0;
  return static_cast<uint16_t>(sign | kept);
}

// GCC has _Float16 in C++ from version 12 on x86 and from 13 on Arm, Clang from 15; Ubuntu 22.04 has GCC 11.
#if defined(__aarch64__)
using Float16 = __fp16;
#elif defined(__FLT16_MAX__)
using Float16 = _Float16;
#else
struct Float16 {
  Float16() = default;
#if defined(__F16C__)
  explicit Float16(float value) : bits(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)) {}
  operator float() const { return _cvtsh_ss(bits); }
#else
  explicit Float16(float value) : bits(float_to_half_bits(value)) {}
  operator float() const { return half_bits_to_float(bits); }
#endif
  uint16_t bits;
};
#endif
static_assert(sizeof(Float16) == 2);

}  // namespace
}  // namespace w4a4
