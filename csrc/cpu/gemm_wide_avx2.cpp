// SPDX-License-Identifier: Apache-2.0
// Products with activations over the whole int8 range on AVX2, exact: sums of two products are widened to 32 bits at
// once, because sums of several would not fit into 16.
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

// With weights 0..15, a sum of four products is within 4 * 15 * 128.
struct Avx2WideInt4Micro : Avx2Unpack {
  static constexpr int64_t kBlockBytes = w4a4::kBlockBytes;
  static constexpr int32_t kAdded = 0;
  static constexpr int64_t kSegmentBlocks = 64;
  static constexpr int64_t kUnpackTokens = 5;
  static constexpr int64_t kUnpackTiles = 1;
  static constexpr int kPanelTokens = 4;

  template <int T>
  W4A4_NOINLINE static void packed_tokens(const uint8_t* tile, int64_t blocks, const int8_t* q, int32_t* acc) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[T][2];
    unrolled<T>([&](auto t) W4A4_INLINE { sum[t][0] = sum[t][1] = _mm256_setzero_si256(); });
    for (int64_t b = 0; b < blocks; ++b, tile += kBlockBytes, q += T * kBlockFeatures) {
      const Nibbles w = load_block(tile);
      unrolled<T>([&](auto t) W4A4_INLINE {
        const __m256i a = _mm256_set1_epi32(load_word(q + t * 4));
        const __m256i c = _mm256_set1_epi32(load_word(q + (T + t) * 4));
        const __m256i first = _mm256_add_epi16(_mm256_maddubs_epi16(w.low0, a), _mm256_maddubs_epi16(w.high0, c));
        const __m256i second = _mm256_add_epi16(_mm256_maddubs_epi16(w.low1, a), _mm256_maddubs_epi16(w.high1, c));
        sum[t][0] = pinned(_mm256_add_epi32(sum[t][0], _mm256_madd_epi16(first, ones)));
        sum[t][1] = pinned(_mm256_add_epi32(sum[t][1], _mm256_madd_epi16(second, ones)));
      });
    }
    unrolled<T>([&](auto t) W4A4_INLINE {
      add_to(acc + t * kTileRows, sum[t][0]);
      add_to(acc + t * kTileRows + 8, sum[t][1]);
    });
  }

  template <int T>
  W4A4_NOINLINE static void unpacked_tokens(const uint8_t* bytes, int64_t blocks, const int8_t* q, int32_t* acc) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[T][2];
    unrolled<T>([&](auto t) W4A4_INLINE { sum[t][0] = sum[t][1] = _mm256_setzero_si256(); });
    for (int64_t half = 0; half < 2 * blocks; ++half, bytes += 64, q += T * 4) {
      const __m256i w0 = load256(bytes), w1 = load256(bytes + 32);
      unrolled<T>([&](auto t) W4A4_INLINE {
        const __m256i a = _mm256_set1_epi32(load_word(q + t * 4));
        sum[t][0] = pinned(_mm256_add_epi32(sum[t][0], _mm256_madd_epi16(_mm256_maddubs_epi16(w0, a), ones)));
        sum[t][1] = pinned(_mm256_add_epi32(sum[t][1], _mm256_madd_epi16(_mm256_maddubs_epi16(w1, a), ones)));
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

// int8 x int8 through 16-bit operands. vpmaddubsw would need the magnitude of one operand, and that of -128 times 128,
// twice, does not fit into 16 bits.
struct Avx2WideInt8Micro : NeverUnpacks {
  static constexpr int64_t kBlockBytes = kInt8BlockBytes;
  static constexpr int32_t kAdded = 0;
  static constexpr int kPanelTokens = 2;
  static constexpr int kQuarters = 4;  // of a tile: 4 rows x 4 features are one vector of 16-bit values

  W4A4_INLINE static __m256i load_quarter(const uint8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  // Two vectors with two sums for each of 4 rows -> one with the sums of 8 rows.
  W4A4_INLINE static __m256i rows(__m256i first, __m256i second) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), 0xD8);
  }

  template <int T>
  W4A4_NOINLINE static void tokens(const uint8_t* tile, int64_t blocks, const int8_t* q, int32_t* acc) {
    __m256i sum[T][kQuarters];
    unrolled<T>([&](auto t) W4A4_INLINE {
      unrolled<kQuarters>([&](auto i) W4A4_INLINE { sum[t][i] = _mm256_setzero_si256(); });
    });
    for (int64_t half = 0; half < 2 * blocks; ++half, tile += 64, q += T * 4) {
      __m256i a[T];
      unrolled<T>([&](auto t) W4A4_INLINE { a[t] = _mm256_cvtepi8_epi16(_mm_set1_epi32(load_word(q + t * 4))); });
      unrolled<kQuarters>([&](auto i) W4A4_INLINE {
        const __m256i w = load_quarter(tile + i * 16);
        unrolled<T>([&](auto t)
                        W4A4_INLINE { sum[t][i] = pinned(_mm256_add_epi32(sum[t][i], _mm256_madd_epi16(w, a[t]))); });
      });
    }
    unrolled<T>([&](auto t) W4A4_INLINE {
      add_to(acc + t * kTileRows, rows(sum[t][0], sum[t][1]));
      add_to(acc + t * kTileRows + 8, rows(sum[t][2], sum[t][3]));
    });
  }

  static void run_packed(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t count, int32_t* acc) {
    with_constant<kPanelTokens>(count, [&](auto t) { tokens<t>(tile, blocks, q, acc); });
  }
};

}  // namespace

extern const Gemm gemm_wide_int4_avx2{gemm<Avx2WideInt4Micro>, Avx2WideInt4Micro::kPanelTokens, 4};
extern const Gemm gemm_wide_int8_avx2{gemm<Avx2WideInt8Micro>, Avx2WideInt8Micro::kPanelTokens, 4};

}  // namespace w4a4
