// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include <cstdint>

#include "tiles.h"

namespace w4a4 {

// Four tiles of sums from two by two operands, as the kernel has them; 16 x 16 x 64 products each.
int64_t dot_peak_avx512amx(int64_t steps) {
  const Tiles configured;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  return steps * 4 * 16 * 16 * 64;
}

}  // namespace w4a4
