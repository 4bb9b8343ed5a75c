// SPDX-License-Identifier: Apache-2.0
// A field of a parameter struct. On a device a value that is too large for it silently loses its upper bits; here it is
// reported, with the line of the assignment.
#pragma once

#include <concepts>
#include <cstdint>
#include <limits>

#include "../machine/location.h"

namespace ascendc_emulator {

void report_truncated(int64_t value, int64_t largest, const Location& at);

template <std::integral T>
class Field {
 public:
  constexpr Field() = default;
  template <std::integral U>
  constexpr Field(U value, Location at = Location::current())  // NOLINT: implicit as the field
      : value_(static_cast<T>(value)) {
    if (static_cast<U>(value_) != value || (value < 0) != (value_ < 0)) {
      report_truncated(static_cast<int64_t>(value), static_cast<int64_t>(std::numeric_limits<T>::max()), at);
    }
  }
  constexpr operator T() const { return value_; }  // NOLINT

 private:
  T value_ = 0;
};

}  // namespace ascendc_emulator
