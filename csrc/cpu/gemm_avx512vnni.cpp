// SPDX-License-Identifier: Apache-2.0
// vpdpbusd on 512 bits: one instruction per half block (16 rows x 4 features) and token.
#define W4A4_VECTOR_FLOATS 16
#include <immintrin.h>

#include "gemm_impl.h"

namespace w4a4 {
namespace {

struct Avx512VnniMicro {
  static constexpr int64_t kBlockBytes = w4a4::kBlockBytes;
  static constexpr int64_t kSegmentBlocks = 128;
  static constexpr int64_t kUnpackTokens = 9;

  static __m512i broadcast4(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
  }

  static void unpack(const uint8_t* tile, int64_t blocks, uint8_t* bytes) {
    const __m512i mask = _mm512_set1_epi8(0xF);
    for (int64_t b = 0; b < blocks; ++b) {
      const __m512i packed = _mm512_loadu_si512(tile + b * 64);
      _mm512_store_si512(bytes + b * 128, _mm512_and_si512(packed, mask));
      _mm512_store_si512(bytes + b * 128 + 64, _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask));
    }
  }

  template <int T>
  static void packed_tokens(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    const __m512i mask = _mm512_set1_epi8(0xF);
    // Two sums per token hide the latency of vpdpbusd.
    __m512i low_sum[T], high_sum[T];
    for (int t = 0; t < T; ++t) {
      low_sum[t] = _mm512_loadu_si512(acc + t * kTileRows);
      high_sum[t] = _mm512_setzero_si512();
    }
    for (int64_t b = 0; b < blocks; ++b) {
      _mm_prefetch(reinterpret_cast<const char*>(tile + b * 64 + 2048), _MM_HINT_T0);
      const __m512i packed = _mm512_loadu_si512(tile + b * 64);
      const __m512i low = _mm512_and_si512(packed, mask);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
      for (int t = 0; t < T; ++t) {
        low_sum[t] = _mm512_dpbusd_epi32(low_sum[t], low, broadcast4(q + t * q_stride + b * 8));
        high_sum[t] = _mm512_dpbusd_epi32(high_sum[t], high, broadcast4(q + t * q_stride + b * 8 + 4));
      }
    }
    for (int t = 0; t < T; ++t) _mm512_storeu_si512(acc + t * kTileRows, _mm512_add_epi32(low_sum[t], high_sum[t]));
  }

  template <int T>
  static void unpacked_tokens(const uint8_t* bytes, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    __m512i sum[T];
    for (int t = 0; t < T; ++t) sum[t] = _mm512_loadu_si512(acc + t * kTileRows);
    for (int64_t half = 0; half < 2 * blocks; ++half) {
      const __m512i w = _mm512_load_si512(bytes + half * 64);
      for (int t = 0; t < T; ++t) sum[t] = _mm512_dpbusd_epi32(sum[t], w, broadcast4(q + t * q_stride + half * 4));
    }
    for (int t = 0; t < T; ++t) _mm512_storeu_si512(acc + t * kTileRows, sum[t]);
  }

  static void run_packed(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int64_t tokens,
                         int32_t* acc) {
    int64_t t = 0;
    for (; t + 8 <= tokens; t += 8) packed_tokens<8>(tile, blocks, q + t * q_stride, q_stride, acc + t * kTileRows);
    for (; t + 4 <= tokens; t += 4) packed_tokens<4>(tile, blocks, q + t * q_stride, q_stride, acc + t * kTileRows);
    for (; t < tokens; ++t) packed_tokens<1>(tile, blocks, q + t * q_stride, q_stride, acc + t * kTileRows);
  }

  static void run_unpacked(const uint8_t* bytes, int64_t blocks, const int8_t* q, int64_t q_stride, int64_t tokens,
                           int32_t* acc) {
    int64_t t = 0;
    for (; t + 16 <= tokens; t += 16) {
      unpacked_tokens<16>(bytes, blocks, q + t * q_stride, q_stride, acc + t * kTileRows);
    }
    for (; t + 4 <= tokens; t += 4) unpacked_tokens<4>(bytes, blocks, q + t * q_stride, q_stride, acc + t * kTileRows);
    for (; t < tokens; ++t) unpacked_tokens<1>(bytes, blocks, q + t * q_stride, q_stride, acc + t * kTileRows);
  }
};

}  // namespace

void gemm_avx512vnni(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, int64_t begin, int64_t end) {
  gemm<Avx512VnniMicro>(args, tile_begin, tile_end, begin, end);
}

}  // namespace w4a4
