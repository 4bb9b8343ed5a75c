// SPDX-License-Identifier: Apache-2.0
// Without VNNI the dot product is vpmaddubsw, which adds two products in 16 bits. With weights 0..15 and activations
// -8..7 a pair is within 240, so 68 blocks (two pairs each) fit into 16 bits before they must be widened.
#define W4A4_VECTOR_FLOATS 8
#include <immintrin.h>

#include "gemm_impl.h"
#include "unpack_avx2.h"

namespace w4a4 {
namespace {

// sum + pairs, pinned. As an instruction, because GCC copies the registers of a pinned intrinsic back and forth.
W4A4_INLINE inline __m256i accumulate(__m256i sum, __m256i pairs) {
  asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(pairs));
  return sum;
}

// acc[0..7] += pairs of 16-bit sums.
W4A4_INLINE inline void widen(__m256i sums, int32_t* acc) {
  auto* target = reinterpret_cast<__m256i*>(acc);
  const __m256i wide = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
  _mm256_storeu_si256(target, _mm256_add_epi32(_mm256_loadu_si256(target), wide));
}

struct Avx2Micro : Avx2Unpack {
  static constexpr int64_t kBlockBytes = w4a4::kBlockBytes;
  static constexpr int32_t kAdded = 0;
  static constexpr int64_t kSegmentBlocks = 64;
  static constexpr int64_t kUnpackTokens = 5;
  static constexpr int64_t kUnpackTiles = 1;
  static constexpr int kPanelTokens = 6;

  template <int T>
  W4A4_NOINLINE static void packed_tokens(const uint8_t* tile, int64_t blocks, const int8_t* q, int32_t* acc) {
    __m256i sum[T][2];
    unrolled<T>([&](auto t) W4A4_INLINE { sum[t][0] = sum[t][1] = _mm256_setzero_si256(); });
    for (int64_t b = 0; b < blocks; ++b, tile += kBlockBytes, q += T * kBlockFeatures) {
      const Nibbles w = load_block(tile);
      unrolled<T>([&](auto t) W4A4_INLINE {
        const __m256i a = _mm256_set1_epi32(load_word(q + t * 4));
        const __m256i c = _mm256_set1_epi32(load_word(q + (T + t) * 4));
        sum[t][0] =
            accumulate(sum[t][0], _mm256_add_epi16(_mm256_maddubs_epi16(w.low0, a), _mm256_maddubs_epi16(w.high0, c)));
        sum[t][1] =
            accumulate(sum[t][1], _mm256_add_epi16(_mm256_maddubs_epi16(w.low1, a), _mm256_maddubs_epi16(w.high1, c)));
      });
    }
    unrolled<T>([&](auto t) W4A4_INLINE {
      widen(sum[t][0], acc + t * kTileRows);
      widen(sum[t][1], acc + t * kTileRows + 8);
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
        sum[t][0] = accumulate(sum[t][0], _mm256_maddubs_epi16(w0, a));
        sum[t][1] = accumulate(sum[t][1], _mm256_maddubs_epi16(w1, a));
      });
    }
    unrolled<T>([&](auto t) W4A4_INLINE {
      widen(sum[t][0], acc + t * kTileRows);
      widen(sum[t][1], acc + t * kTileRows + 8);
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

// int8 x int8, exact: vpmaddubsw takes |w| and q with the sign of w, so that a pair is at most 2 * 128 * 127 and fits
// into 16 bits. (With q + 128 as the unsigned operand, as oneDNN has it, pairs saturate.)
struct Avx2Int8Micro : NeverUnpacks {
  static constexpr int64_t kBlockBytes = kInt8BlockBytes;
  static constexpr int32_t kAdded = 0;
  static constexpr int kPanelTokens = 4;

  template <int T>
  W4A4_NOINLINE static void tokens(const uint8_t* tile, int64_t blocks, const int8_t* q, int32_t* acc) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[T][2];
    unrolled<T>([&](auto t) W4A4_INLINE { sum[t][0] = sum[t][1] = _mm256_setzero_si256(); });
    for (int64_t i = 0; i < 2 * blocks; ++i, tile += 64, q += T * 4) {
      unrolled<2>([&](auto half) W4A4_INLINE {
        const __m256i w = load256(tile + half * 32);
        const __m256i magnitude = _mm256_abs_epi8(w);
        unrolled<T>([&](auto t) W4A4_INLINE {
          const __m256i a = _mm256_sign_epi8(_mm256_set1_epi32(load_word(q + t * 4)), w);
          const __m256i pairs = _mm256_maddubs_epi16(magnitude, a);
          sum[t][half] = pinned(_mm256_add_epi32(sum[t][half], _mm256_madd_epi16(pairs, ones)));
        });
      });
    }
    unrolled<T>([&](auto t) W4A4_INLINE {
      unrolled<2>([&](auto half) W4A4_INLINE {
        auto* target = reinterpret_cast<__m256i*>(acc + t * kTileRows + half * 8);
        _mm256_storeu_si256(target, _mm256_add_epi32(_mm256_loadu_si256(target), sum[t][half]));
      });
    });
  }

  static void run_packed(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t count, int32_t* acc) {
    with_constant<kPanelTokens>(count, [&](auto t) { tokens<t>(tile, blocks, q, acc); });
  }
};

}  // namespace

extern const Gemm gemm_avx2{gemm<Avx2Micro>, Avx2Micro::kPanelTokens, 4};
extern const Gemm gemm_int8_avx2{gemm<Avx2Int8Micro>, Avx2Int8Micro::kPanelTokens, 4};

}  // namespace w4a4
