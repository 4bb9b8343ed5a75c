// SPDX-License-Identifier: Apache-2.0
// int4 blocks to bytes with AVX2, for the kernels that work on 256 bits.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "layout.h"
#include "vector.h"

namespace w4a4 {
namespace {

W4A4_INLINE inline __m256i load256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// A block as bytes 0..15: features 0..3 of rows 0..7 and of rows 8..15, then features 4..7.
struct Nibbles {
  __m256i low0, low1, high0, high1;
};

W4A4_INLINE inline Nibbles load_block(const uint8_t* block) {
  // Far enough ahead to cover the latency of memory; the hardware stops at each page.
  _mm_prefetch(reinterpret_cast<const char*>(block + 1024), _MM_HINT_T0);
  const __m256i mask = _mm256_set1_epi8(0xF);
  const __m256i first = load256(block), second = load256(block + 32);
  return {_mm256_and_si256(first, mask), _mm256_and_si256(second, mask),
          _mm256_and_si256(_mm256_srli_epi16(first, 4), mask), _mm256_and_si256(_mm256_srli_epi16(second, 4), mask)};
}

struct Avx2Unpack {
  static void unpack(const uint8_t* tile, int64_t blocks, uint8_t* bytes) {
    for (int64_t b = 0; b < blocks; ++b, tile += kBlockBytes, bytes += 2 * kBlockBytes) {
      const Nibbles w = load_block(tile);
      auto* target = reinterpret_cast<__m256i*>(bytes);
      _mm256_store_si256(target, w.low0);
      _mm256_store_si256(target + 1, w.low1);
      _mm256_store_si256(target + 2, w.high0);
      _mm256_store_si256(target + 3, w.high1);
    }
  }
};

}  // namespace
}  // namespace w4a4
