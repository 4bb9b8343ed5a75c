// SPDX-License-Identifier: Apache-2.0
// Fractals: the blocks of 16 rows of 32 bytes that matrices consist of in L0A, L0B and L0C.
#pragma once

#include "ascendc_emulator/api/cube.h"

namespace ascendc_emulator {

inline constexpr uint32_t kFractalBytes = 512;
inline constexpr uint32_t kFractalRows = 16;
inline constexpr uint32_t kMaxMatrixSize = 4095;  // m, n and k of an instruction

inline uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// Elements of a fractal's 32-byte row.
inline uint32_t row_elements(ElementType type) {
  switch (type) {
    case ElementType::kInt4:
      return 64;
    case ElementType::kInt8:
      return 32;
    case ElementType::kHalf:
    case ElementType::kBFloat16:
      return 16;
    default:
      return 8;
  }
}

inline uint32_t size_of(ElementType type) {
  switch (type) {
    case ElementType::kInt4:
    case ElementType::kInt8:
      return 1;
    case ElementType::kHalf:
    case ElementType::kBFloat16:
      return 2;
    default:
      return 4;
  }
}

}  // namespace ascendc_emulator
