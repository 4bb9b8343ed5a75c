// SPDX-License-Identifier: Apache-2.0
// vpdpbusd on 256 bits (client CPUs without AVX-512): four products summed into 32 bits, so nothing needs widening.
#define W4A4_VECTOR_FLOATS 8
#include <immintrin.h>

#include "gemm_impl.h"
#include "unpack_avx2.h"

namespace w4a4 {
namespace {

W4A4_INLINE inline void add_to(int32_t* acc, __m256i sum) {
  auto* target = reinterpret_cast<__m256i*>(acc);
  _mm256_storeu_si256(target, _mm256_add_epi32(_mm256_loadu_si256(target), sum));
}

struct AvxVnniMicro : Avx2Unpack {
  static constexpr int64_t kBlockBytes = w4a4::kBlockBytes;
  static constexpr int32_t kAdded = 0;
  static constexpr int64_t kSegmentBlocks = 64;
  static constexpr int64_t kUnpackTokens = 5;
  static constexpr int64_t kUnpackTiles = 1;
  static constexpr int kPanelTokens = 6;

  template <int T>
  W4A4_NOINLINE static void packed_tokens(const uint8_t* tile, int64_t blocks, const int8_t* q, int32_t* acc) {
    // With one or two tokens the low and high nibbles have sums of their own, to hide the latency of vpdpbusd.
    constexpr int kHigh = T <= 2 ? 1 : 0;
    __m256i sum[T][2][kHigh + 1];
    unrolled<T>([&](auto t) W4A4_INLINE {
      unrolled<kHigh + 1>([&](auto s) W4A4_INLINE { sum[t][0][s] = sum[t][1][s] = _mm256_setzero_si256(); });
    });
    for (int64_t b = 0; b < blocks; ++b, tile += kBlockBytes, q += T * kBlockFeatures) {
      const Nibbles w = load_block(tile);
      unrolled<T>([&](auto t) W4A4_INLINE {
        const __m256i a = _mm256_set1_epi32(load_word(q + t * 4));
        const __m256i c = _mm256_set1_epi32(load_word(q + (T + t) * 4));
        sum[t][0][0] = pinned(_mm256_dpbusd_avx_epi32(sum[t][0][0], w.low0, a));
        sum[t][1][0] = pinned(_mm256_dpbusd_avx_epi32(sum[t][1][0], w.low1, a));
        sum[t][0][kHigh] = pinned(_mm256_dpbusd_avx_epi32(sum[t][0][kHigh], w.high0, c));
        sum[t][1][kHigh] = pinned(_mm256_dpbusd_avx_epi32(sum[t][1][kHigh], w.high1, c));
      });
    }
    unrolled<T>([&](auto t) W4A4_INLINE {
      unrolled<2>([&](auto half) W4A4_INLINE {
        add_to(acc + t * kTileRows + half * 8, sum[t][half][0]);
        if constexpr (kHigh == 1) add_to(acc + t * kTileRows + half * 8, sum[t][half][1]);
      });
    });
  }

  template <int T>
  W4A4_NOINLINE static void unpacked_tokens(const uint8_t* bytes, int64_t blocks, const int8_t* q, int32_t* acc) {
    __m256i sum[T][2];
    unrolled<T>([&](auto t) W4A4_INLINE { sum[t][0] = sum[t][1] = _mm256_setzero_si256(); });
    for (int64_t half = 0; half < 2 * blocks; ++half, bytes += 64, q += T * 4) {
      const __m256i w0 = load256(bytes), w1 = load256(bytes + 32);
      unrolled<T>([&](auto t) W4A4_INLINE {
        const __m256i a = _mm256_set1_epi32(load_word(q + t * 4));
        sum[t][0] = pinned(_mm256_dpbusd_avx_epi32(sum[t][0], w0, a));
        sum[t][1] = pinned(_mm256_dpbusd_avx_epi32(sum[t][1], w1, a));
      });
    }
    unrolled<T>([&](auto t) W4A4_INLINE {
      add_to(acc + t * kTileRows, sum[t][0]);
      add_to(acc + t * kTileRows + 8, sum[t][1]);
    });
  }

  static void run_packed(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t tokens, int32_t* acc) {
    with_constant<kUnpackTokens - 1>(tokens, [&](auto t) { packed_tokens<t>(tile, blocks, q, acc); });
  }

  static void run_unpacked(const uint8_t* bytes, int64_t, int64_t blocks, const int8_t* q, int64_t tokens, int32_t* acc,
                           int64_t, NextWeights) {
    with_constant<kPanelTokens>(tokens, [&](auto t) { unpacked_tokens<t>(bytes, blocks, q, acc); });
  }
};

}  // namespace

extern const Gemm gemm_avxvnni{gemm<AvxVnniMicro>, AvxVnniMicro::kPanelTokens, 4};

}  // namespace w4a4
