// SPDX-License-Identifier: Apache-2.0
// Stored blocks to unsigned bytes with AVX-512, for instructions whose weights are unsigned.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "layout.h"
#include "vector.h"

namespace w4a4 {
namespace {

// Features 0..3 of a block's 16 rows, and features 4..7.
struct Bytes512 {
  __m512i low, high;
};

struct Int4Blocks {
  static constexpr int64_t kBlockBytes = w4a4::kBlockBytes;
  static constexpr int32_t kAdded = 0;

  W4A4_INLINE static Bytes512 load(const uint8_t* block) {
    const __m512i mask = _mm512_set1_epi8(0xF), packed = _mm512_loadu_si512(block);
    return {_mm512_and_si512(packed, mask), _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask)};
  }
};

// With 255 * 128 as the largest product, sums of 65,793 features fit into 32 bits.
struct Int8Blocks {
  static constexpr int64_t kBlockBytes = kInt8BlockBytes;
  static constexpr int32_t kAdded = 128;

  W4A4_INLINE static Bytes512 load(const uint8_t* block) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));  // w + 128
    return {_mm512_xor_si512(_mm512_loadu_si512(block), flip), _mm512_xor_si512(_mm512_loadu_si512(block + 64), flip)};
  }
};

// Also fetches every line of the block that lies kAhead bytes further.
template <class Blocks, int kAhead>
W4A4_INLINE inline Bytes512 load_and_fetch(const uint8_t* block) {
  constexpr int kLine = 64;
  unrolled<Blocks::kBlockBytes / kLine>([&](auto line) W4A4_INLINE {
    _mm_prefetch(reinterpret_cast<const char*>(block + kAhead + line * kLine), _MM_HINT_T0);
  });
  return Blocks::load(block);
}

// How far ahead covers the latency of memory.
constexpr int kAheadInMemory = 4096;

// 128 bytes per block: 16 rows x 4 features, twice.
template <class Blocks, int kAhead>
void unpack_avx512(const uint8_t* tile, int64_t blocks, uint8_t* bytes) {
  for (int64_t b = 0; b < blocks; ++b, tile += Blocks::kBlockBytes, bytes += 128) {
    const Bytes512 w = load_and_fetch<Blocks, kAhead>(tile);
    _mm512_store_si512(bytes, w.low);
    _mm512_store_si512(bytes + 64, w.high);
  }
}

}  // namespace
}  // namespace w4a4
