// SPDX-License-Identifier: Apache-2.0
// Every half, and floats on both sides of every boundary between two of them. The values come from ldexp, not from
// bits.
#include "float16_test.h"

#include <cmath>
#include <limits>

#include "harness.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

double value_of(uint32_t half) {
  const uint32_t exponent = half >> 10, fraction = half & 0x3FF;
  return exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, static_cast<int>(exponent) - 25);
}

template <class T>
uint16_t bits_of(float value) {
  const auto half = static_cast<T>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

template <class T>
float float_of(uint16_t bits) {
  T half;
  std::memcpy(&half, &bits, sizeof bits);
  return static_cast<float>(half);
}

uint16_t software_bits(float value) { return w4a4::float_to_half_bits(value); }

using ToBits = uint16_t (*)(float);
using ToFloat = float (*)(uint16_t);

void test_conversions(ToBits to_bits, ToFloat to_float, const std::string& name) {
  bool widens = true, rounds = true;
  for (uint32_t half = 0; half < 0x7C00; ++half) {
    // The infinite half stands for 2^16 where values are rounded.
    const double value = value_of(half), middle = (value + value_of(half + 1)) / 2;
    const auto tie = static_cast<float>(middle);
    const auto even = static_cast<uint16_t>(half % 2 == 0 ? half : half + 1);
    for (const uint32_t sign : {0u, 0x8000u}) {
      const float factor = sign ? -1.0f : 1.0f;
      const float widened = to_float(static_cast<uint16_t>(sign | half));
      widens &= widened == factor * value && std::signbit(widened) == (sign != 0);
      rounds &= to_bits(factor * static_cast<float>(value)) == (sign | half);
      rounds &= to_bits(factor * tie) == (sign | even);
      rounds &= to_bits(factor * std::nextafter(tie, 0.0f)) == (sign | half);
      rounds &= to_bits(factor * std::nextafter(tie, kInfinity)) == (sign | (half + 1));
    }
  }
  check(widens, name + ": every finite half as a float");
  check(rounds, name + ": floats around every boundary, rounded to nearest even");
  for (const uint32_t sign : {0u, 0x8000u}) {
    const float factor = sign ? -1.0f : 1.0f;
    check(to_float(static_cast<uint16_t>(sign | 0x7C00)) == factor * kInfinity, name + ": infinity as a float");
    check(to_bits(factor * kInfinity) == (sign | 0x7C00), name + ": infinity as a half");
    check(to_bits(factor * std::numeric_limits<float>::max()) == (sign | 0x7C00), name + ": overflow");
    check(to_bits(factor * std::numeric_limits<float>::denorm_min()) == sign, name + ": underflow");
  }
  bool stays_nan = true;
  for (uint32_t payload = 1; payload < 0x400; ++payload) {
    stays_nan &= std::isnan(to_float(static_cast<uint16_t>(0x7C00 | payload)));
  }
  for (uint32_t payload = 1; payload < 0x800000; payload = payload * 2 + 1) {
    float nan;
    const uint32_t bits = 0x7F800000 | payload;
    std::memcpy(&nan, &bits, sizeof nan);
    stays_nan &= (to_bits(nan) & 0x7FFF) > 0x7C00;
  }
  check(stays_nan, name + ": NaN stays NaN, whatever its payload");
}

}  // namespace

void test_float16() {
  test_conversions(bits_of<w4a4::Float16>, float_of<w4a4::Float16>, "Float16");
  test_conversions(software_bits, w4a4::half_bits_to_float, "float16 in software");
}
