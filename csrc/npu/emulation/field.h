// SPDX-License-Identifier: Apache-2.0
// A field of a parameter struct. On a device a value that is too large for it loses its upper bits in silence; here it
// is reported, with the line of the assignment.
#pragma once

#include <concepts>
#include <cstdint>
#include <limits>
#include <source_location>

namespace emulation {

void report_truncated(int64_t value, int64_t largest, const std::source_location& at);

template <std::integral T>
class Field {
 public:
  constexpr Field() = default;
  template <std::integral U>
  constexpr Field(U value, std::source_location at = std::source_location::current())  // NOLINT: implicit as the field
      : value_(static_cast<T>(value)) {
    if (static_cast<U>(value_) != value || (value < 0) != (value_ < 0)) {
      report_truncated(static_cast<int64_t>(value), static_cast<int64_t>(std::numeric_limits<T>::max()), at);
    }
  }
  constexpr operator T() const { return value_; }  // NOLINT

 private:
  T value_ = 0;
};

}  // namespace emulation
