// SPDX-License-Identifier: Apache-2.0
// Conversions of the vector unit, with the documented pairs of types and rounding modes.
#pragma once

#include <cmath>
#include <limits>

#include "operand.h"

namespace ascendc_emulator {

template <typename T, typename U>
constexpr bool can_cast() {
  using std::is_same_v;
  if constexpr (is_same_v<U, half>) {
    return is_same_v<T, float> || is_same_v<T, int32_t> || is_same_v<T, int16_t> || is_same_v<T, int8_t> ||
           is_same_v<T, uint8_t> || kIsInt4<T>;
  } else if constexpr (is_same_v<U, float>) {
    return is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat16_t> || is_same_v<T, int32_t> ||
           is_same_v<T, int64_t> || is_same_v<T, int16_t>;
  } else if constexpr (is_same_v<U, bfloat16_t>) {
    return is_same_v<T, float> || is_same_v<T, int32_t>;
  } else if constexpr (is_same_v<U, int32_t>) {
    return is_same_v<T, float> || is_same_v<T, int64_t> || is_same_v<T, int16_t>;
  } else if constexpr (is_same_v<U, int16_t>) {
    return is_same_v<T, half> || is_same_v<T, float>;
  } else {
    return (is_same_v<U, int8_t> || is_same_v<U, uint8_t> || kIsInt4<U>) && is_same_v<T, half>;
  }
}

// Whether the documents list the mode for this pair of types.
template <typename T, typename U>
constexpr bool takes_mode(AscendC::RoundMode mode) {
  using AscendC::RoundMode;
  constexpr bool kIsExact = (sizeof(T) > sizeof(U) && !std::is_same_v<T, int32_t>) || std::is_same_v<U, int8_t> ||
                            std::is_same_v<U, uint8_t> || kIsInt4<U>;
  if (std::is_same_v<U, bfloat16_t> && std::is_same_v<T, int32_t>) {
    return mode != RoundMode::CAST_NONE && mode != RoundMode::CAST_ODD;
  }
  if (kIsExact || (std::is_same_v<U, int32_t> && !std::is_same_v<T, float>)) return mode == RoundMode::CAST_NONE;
  if (mode == RoundMode::CAST_ODD) return std::is_same_v<U, float> && std::is_same_v<T, half>;
  if (mode == RoundMode::CAST_NONE) {
    return (std::is_same_v<U, float> && std::is_same_v<T, half>) || (std::is_same_v<U, half> && (sizeof(T) == 1)) ||
           std::is_same_v<U, int16_t> || (std::is_same_v<U, int32_t> && std::is_same_v<T, float>);
  }
  return true;
}

inline bool increments(AscendC::RoundMode mode, uint64_t kept, uint64_t lost, uint64_t half, bool is_negative) {
  using AscendC::RoundMode;
  switch (mode) {
    case RoundMode::CAST_FLOOR:
      return is_negative && lost != 0;
    case RoundMode::CAST_CEIL:
      return !is_negative && lost != 0;
    case RoundMode::CAST_ROUND:
      return half != 0 && lost >= half;
    case RoundMode::CAST_TRUNC:
      return false;
    case RoundMode::CAST_ODD:
      return lost != 0 && !(kept & 1);
    default:
      return NearestEven{}(kept, lost, half, is_negative);
  }
}

inline double round_to_integer(double value, AscendC::RoundMode mode) {
  using AscendC::RoundMode;
  switch (mode) {
    case RoundMode::CAST_FLOOR:
      return std::floor(value);
    case RoundMode::CAST_CEIL:
      return std::ceil(value);
    case RoundMode::CAST_ROUND:
      return std::round(value);
    case RoundMode::CAST_TRUNC:
      return std::trunc(value);
    default:
      return std::nearbyint(value);
  }
}

// Saturates, as the documents describe the default mode.
template <typename T>
T saturated(double value, double lowest, double highest) {
  if (std::isnan(value)) return 0;
  return static_cast<T>(std::clamp(value, lowest, highest));
}

template <typename T, typename U>
T cast_number(U value, AscendC::RoundMode mode) {
  if constexpr (std::is_same_v<T, half> || std::is_same_v<T, bfloat16_t>) {
    const auto rounding = [mode](uint64_t kept, uint64_t lost, uint64_t half_unit, bool is_negative) {
      return increments(mode, kept, lost, half_unit, is_negative);
    };
    T result;
    if constexpr (std::is_same_v<T, half>) {
      result.bits = narrow<10, 5>(static_cast<float>(value), true, rounding);
    } else {
      result.bits = narrow<7, 8>(static_cast<float>(value), true, rounding);
    }
    return result;
  } else if constexpr (std::is_same_v<T, float>) {
    if constexpr (std::is_same_v<U, float>) {
      return static_cast<float>(round_to_integer(value, mode));
    } else if constexpr (std::is_same_v<U, int32_t>) {
      const float nearest = static_cast<float>(value);
      const double error = static_cast<double>(nearest) - static_cast<double>(value);
      using AscendC::RoundMode;
      const bool towards_zero = mode == RoundMode::CAST_TRUNC;
      const bool down = mode == RoundMode::CAST_FLOOR || (towards_zero && value > 0);
      const bool up = mode == RoundMode::CAST_CEIL || (towards_zero && value < 0);
      if (down && error > 0) return std::nextafter(nearest, -INFINITY);
      if (up && error < 0) return std::nextafter(nearest, INFINITY);
      if (mode == RoundMode::CAST_ROUND && error != 0) {
        // Ties go away from zero: to the neighbour away from zero if it is as near.
        const float away = std::nextafter(nearest, value < 0 ? -INFINITY : INFINITY);
        if (std::abs(away - static_cast<double>(value)) == std::abs(error)) return away;
      }
      return nearest;
    } else {
      return static_cast<float>(value);
    }
  } else {
    constexpr double kHighest = static_cast<double>(std::numeric_limits<T>::max());
    const double rounded = round_to_integer(static_cast<double>(value), mode);
    if constexpr (std::is_same_v<T, int64_t>) {
      if (rounded >= kHighest) return std::numeric_limits<T>::max();
    }
    return saturated<T>(rounded, static_cast<double>(std::numeric_limits<T>::min()), kHighest);
  }
}

template <typename T, typename U>
void cast_row(void* to, const void* from, uint32_t count, AscendC::RoundMode mode) {
  if constexpr (kIsInt4<T>) {
    uint8_t* bytes = static_cast<uint8_t*>(to);
    const half* values = static_cast<const half*>(from);
    for (uint32_t i = 0; i < count; i += 2) {
      const auto nibble = [&](uint32_t at) {
        return static_cast<int>(saturated<int32_t>(round_to_integer(static_cast<float>(values[at]), mode), -8, 7)) & 15;
      };
      bytes[i / 2] = static_cast<uint8_t>(nibble(i) | nibble(i + 1) << 4);
    }
  } else if constexpr (kIsInt4<U>) {
    const uint8_t* bytes = static_cast<const uint8_t*>(from);
    T* values = static_cast<T*>(to);
    for (uint32_t i = 0; i < count; ++i) {
      values[i] = static_cast<float>(static_cast<int8_t>(bytes[i / 2] << (i % 2 ? 0 : 4)) >> 4);
    }
  } else {
    const U* values = static_cast<const U*>(from);
    T* results = static_cast<T*>(to);
    for (uint32_t i = 0; i < count; ++i) results[i] = cast_number<T, U>(values[i], mode);
  }
}

template <typename T, typename U>
void cast(const Region& dst, const Region& src, AscendC::RoundMode mode, const AscendC::UnaryRepeatParams& p,
          const Repeats& r, const Location& at) {
  static_assert(can_cast<T, U>(), "the vector unit has no such conversion");
  Instruction instruction(Pipe::kV, "Cast", at);
  instruction.Check(takes_mode<T, U>(mode), Detector::kParameter, "the conversion does not take this rounding mode");
  Operand<T> target(instruction, dst, {p.dstBlkStride, p.dstRepStride});
  Operand<U> source(instruction, src, {p.srcBlkStride, p.srcRepStride});
  target.CheckAlignment();
  source.CheckAlignment();
  constexpr uint32_t kWider = sizeof(T) > sizeof(U) ? sizeof(T) : sizeof(U);
  check_repeats(instruction, r, kWider);
  check_overlap(instruction, target, source, r);
  const uint32_t repeats = r.count ? 1 : r.repeats, count = r.count ? static_cast<uint32_t>(r.count) : r.mask;
  instruction.Check(!(kIsInt4<T> || kIsInt4<U>) || count % 2 == 0, Detector::kParameter,
                    "counts of int4b_t must be even");
  instruction.Compute(cycles_of(r, kWider));
  if (!instruction.is_full()) return;
  for (uint32_t i = 0; i < repeats; ++i) {
    const U* from = source.Read(i, count);
    T* to = target.Results(i, count);
    cast_row<T, U>(to, from, count, mode);
    target.Commit(i, count);
  }
}

}  // namespace ascendc_emulator
