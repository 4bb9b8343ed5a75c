// SPDX-License-Identifier: Apache-2.0
// AMX's tile registers. For source files that are compiled for them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace w4a4 {
namespace {

// The tile registers of this thread, all of 16 rows x 64 bytes, while it lives. Whoever uses tiles configures them
// anew, so nothing is restored.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64);
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

}  // namespace
}  // namespace w4a4
