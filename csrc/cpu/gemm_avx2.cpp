// SPDX-License-Identifier: Apache-2.0
// Without VNNI the dot product is vpmaddubsw, which adds two products in 16 bits. With weights 0..15 and activations
// -8..7 a pair is within 240, so 68 blocks (two pairs each) fit into 16 bits before they must be widened.
#define W4A4_VECTOR_FLOATS 8
#include <immintrin.h>

#include "gemm_impl.h"

namespace w4a4 {
namespace {

struct Avx2Micro {
  static constexpr int64_t kBlockBytes = w4a4::kBlockBytes;
  static constexpr int64_t kSegmentBlocks = 64;
  static constexpr int64_t kUnpackTokens = 5;

  static __m256i load256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

  // Four activation bytes in every lane.
  static __m256i broadcast4(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm256_set1_epi32(word);
  }

  // acc[0..7] += pairs of 16-bit sums.
  static void widen(__m256i sums, int32_t* acc) {
    auto* target = reinterpret_cast<__m256i*>(acc);
    const __m256i wide = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
    _mm256_storeu_si256(target, _mm256_add_epi32(_mm256_loadu_si256(target), wide));
  }

  static void unpack(const uint8_t* tile, int64_t blocks, uint8_t* bytes) {
    const __m256i mask = _mm256_set1_epi8(0xF);
    for (int64_t i = 0; i < 2 * blocks; ++i) {
      const __m256i packed = load256(tile + i * 32);
      uint8_t* target = bytes + (i / 2) * 128 + (i % 2) * 32;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_and_si256(packed, mask));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + 64),
                          _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask));
    }
  }

  template <int T>
  static void packed_tokens(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    const __m256i mask = _mm256_set1_epi8(0xF);
    __m256i sum[T][2];
    for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
    for (int64_t b = 0; b < blocks; ++b) {
      _mm_prefetch(reinterpret_cast<const char*>(tile + b * 64 + 1024), _MM_HINT_T0);
      const __m256i p0 = load256(tile + b * 64), p1 = load256(tile + b * 64 + 32);
      const __m256i low0 = _mm256_and_si256(p0, mask), low1 = _mm256_and_si256(p1, mask);
      const __m256i high0 = _mm256_and_si256(_mm256_srli_epi16(p0, 4), mask);
      const __m256i high1 = _mm256_and_si256(_mm256_srli_epi16(p1, 4), mask);
      for (int t = 0; t < T; ++t) {
        const __m256i a = broadcast4(q + t * q_stride + b * 8), c = broadcast4(q + t * q_stride + b * 8 + 4);
        const __m256i s0 = _mm256_add_epi16(_mm256_maddubs_epi16(low0, a), _mm256_maddubs_epi16(high0, c));
        const __m256i s1 = _mm256_add_epi16(_mm256_maddubs_epi16(low1, a), _mm256_maddubs_epi16(high1, c));
        sum[t][0] = _mm256_add_epi16(sum[t][0], s0);
        sum[t][1] = _mm256_add_epi16(sum[t][1], s1);
      }
    }
    for (int t = 0; t < T; ++t) {
      widen(sum[t][0], acc + t * kTileRows);
      widen(sum[t][1], acc + t * kTileRows + 8);
    }
  }

  template <int T>
  static void unpacked_tokens(const uint8_t* bytes, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    __m256i sum[T][2];
    for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
    for (int64_t half = 0; half < 2 * blocks; ++half) {
      const __m256i w0 = load256(bytes + half * 64), w1 = load256(bytes + half * 64 + 32);
      for (int t = 0; t < T; ++t) {
        const __m256i a = broadcast4(q + t * q_stride + half * 4);
        sum[t][0] = _mm256_add_epi16(sum[t][0], _mm256_maddubs_epi16(w0, a));
        sum[t][1] = _mm256_add_epi16(sum[t][1], _mm256_maddubs_epi16(w1, a));
      }
    }
    for (int t = 0; t < T; ++t) {
      widen(sum[t][0], acc + t * kTileRows);
      widen(sum[t][1], acc + t * kTileRows + 8);
    }
  }

  static void run_packed(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int64_t tokens,
                         int32_t* acc) {
    switch (tokens) {
      case 1:
        return packed_tokens<1>(tile, blocks, q, q_stride, acc);
      case 2:
        return packed_tokens<2>(tile, blocks, q, q_stride, acc);
      case 3:
        return packed_tokens<3>(tile, blocks, q, q_stride, acc);
      default:
        return packed_tokens<4>(tile, blocks, q, q_stride, acc);
    }
  }

  static void run_unpacked(const uint8_t* bytes, int64_t blocks, const int8_t* q, int64_t q_stride, int64_t tokens,
                           int32_t* acc) {
    int64_t t = 0;
    for (; t + 6 <= tokens; t += 6) unpacked_tokens<6>(bytes, blocks, q + t * q_stride, q_stride, acc + t * kTileRows);
    for (; t + 2 <= tokens; t += 2) unpacked_tokens<2>(bytes, blocks, q + t * q_stride, q_stride, acc + t * kTileRows);
    for (; t < tokens; ++t) unpacked_tokens<1>(bytes, blocks, q + t * q_stride, q_stride, acc + t * kTileRows);
  }
};

// int8 x int8, exact: vpmaddubsw takes |w| and q with the sign of w, so that a pair is at most 2 * 128 * 127 and fits
// into 16 bits. (With q + 128 as the unsigned operand, as oneDNN has it, pairs saturate.)
struct Avx2Int8Micro : NeverUnpacks {
  static constexpr int64_t kBlockBytes = kInt8BlockBytes;

  template <int T>
  static void tokens(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int32_t* acc) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[T][2];
    for (int t = 0; t < T; ++t) {
      for (int half = 0; half < 2; ++half) {
        sum[t][half] = Avx2Micro::load256(reinterpret_cast<const uint8_t*>(acc + t * kTileRows + half * 8));
      }
    }
    for (int64_t i = 0; i < 2 * blocks; ++i) {
      for (int half = 0; half < 2; ++half) {
        const __m256i w = Avx2Micro::load256(tile + i * 64 + half * 32);
        const __m256i magnitude = _mm256_abs_epi8(w);
        for (int t = 0; t < T; ++t) {
          const __m256i a = _mm256_sign_epi8(Avx2Micro::broadcast4(q + t * q_stride + i * 4), w);
          const __m256i pairs = _mm256_maddubs_epi16(magnitude, a);
          sum[t][half] = _mm256_add_epi32(sum[t][half], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      for (int half = 0; half < 2; ++half) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + t * kTileRows + half * 8), sum[t][half]);
      }
    }
  }

  static void run_packed(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int64_t count,
                         int32_t* acc) {
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) tokens<4>(tile, blocks, q + t * q_stride, q_stride, acc + t * kTileRows);
    for (; t < count; ++t) tokens<1>(tile, blocks, q + t * q_stride, q_stride, acc + t * kTileRows);
  }
};

}  // namespace

void gemm_int8_avx2(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, int64_t begin, int64_t end) {
  gemm<Avx2Int8Micro>(args, tile_begin, tile_end, begin, end);
}

void gemm_avx2(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, int64_t begin, int64_t end) {
  gemm<Avx2Micro>(args, tile_begin, tile_end, begin, end);
}

}  // namespace w4a4
