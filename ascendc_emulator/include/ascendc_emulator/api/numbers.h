// SPDX-License-Identifier: Apache-2.0
// The number types of Ascend C that C++ lacks, and conversions with the rounding modes of its documents.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace ascendc_emulator {

// A float32 rounded to a format with `kFraction` fraction bits and `kExponent` exponent bits, given as that format's
// bits. `increments(kept, lost, half, is_negative)` says whether the kept bits are incremented, given the lost ones and
// what half a unit of the last place is in them. Beyond the largest finite value the result is infinity, or that value
// if `saturates`.
template <int kFraction, int kExponent, typename Increment>
inline uint16_t narrow(float value, bool saturates, Increment increments) {
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  constexpr uint32_t kInfinity = ((1u << kExponent) - 1) << kFraction;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 31;
  const uint16_t sign_bit = static_cast<uint16_t>(sign << (kFraction + kExponent));
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return saturates ? 0 : static_cast<uint16_t>(kInfinity | 1u << (kFraction - 1));
  if (magnitude == 0x7f800000u) return sign_bit | static_cast<uint16_t>(kInfinity - (saturates ? 1 : 0));
  if (magnitude == 0) return sign_bit;
  const int exponent = std::max(static_cast<int>(magnitude >> 23), 1) - 127;
  const uint64_t significand = (magnitude & 0x7fffffu) | (magnitude >> 23 ? 0x800000u : 0u);
  // Units of the last region of the result; subnormal results have fewer bits.
  const int shift = std::min(23 - kFraction + std::max(0, (1 - kBias) - exponent), 40);
  const uint64_t kept = significand >> shift;
  const uint64_t lost = significand & ((uint64_t{1} << shift) - 1);
  const uint64_t rounded = kept + (increments(kept, lost, uint64_t{1} << shift >> 1, sign != 0) ? 1 : 0);
  const int biased = std::max(exponent + kBias, 1);
  const uint64_t encoded = rounded + (static_cast<uint64_t>(biased - 1) << kFraction);
  if (encoded >= kInfinity) return sign_bit | static_cast<uint16_t>(kInfinity - (saturates ? 1 : 0));
  return sign_bit | static_cast<uint16_t>(encoded);
}

struct NearestEven {
  bool operator()(uint64_t kept, uint64_t lost, uint64_t half, bool) const {
    return lost > half || (lost == half && half != 0 && (kept & 1));
  }
};

inline uint16_t half_bits(float value, bool saturates = false) {
  return narrow<10, 5>(value, saturates, NearestEven{});
}
inline uint16_t bfloat16_bits(float value, bool saturates = false) {
  return narrow<7, 8>(value, saturates, NearestEven{});
}

inline float half_value(uint16_t bits) {
  // The float with the same fraction and exponent field is 2^112 too small; the product is exact, subnormals included.
  const uint32_t magnitude = (bits & 0x7fffu) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(special | (bits & 0x8000u) << 16);
}

inline float bfloat16_value(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

}  // namespace ascendc_emulator

struct half {
  uint16_t bits = 0;
  half() = default;
  half(float value) : bits(ascendc_emulator::half_bits(value)) {}  // NOLINT: as on the device
  operator float() const { return ascendc_emulator::half_value(bits); }
};

struct bfloat16_t {
  uint16_t bits = 0;
  bfloat16_t() = default;
  bfloat16_t(float value) : bits(ascendc_emulator::bfloat16_bits(value)) {}  // NOLINT
  operator float() const { return ascendc_emulator::bfloat16_value(bits); }
};

namespace AscendC {

// Two elements per byte, the first in the low nibble; a tensor's offsets and counts are in elements, and even.
struct int4b_t {
  uint8_t storage;
};

}  // namespace AscendC
