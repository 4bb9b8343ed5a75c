// SPDX-License-Identifier: Apache-2.0
// vpdpbusd on 512 bits: one instruction per half block (16 rows x 4 features) and token.
#define W4A4_VECTOR_FLOATS 16
#include <immintrin.h>

#include "gemm_impl.h"
#include "unpack_avx512.h"

namespace w4a4 {
namespace {

W4A4_INLINE inline __m512i broadcast4(const int8_t* p) { return _mm512_set1_epi32(load_word(p)); }

W4A4_INLINE inline void add_to(int32_t* acc, __m512i sum) {
  _mm512_storeu_si512(acc, _mm512_add_epi32(_mm512_loadu_si512(acc), sum));
}

// Far enough for weights that the products before have fetched into the second cache. From further ahead, lines would
// push unpacked weights out of the first.
constexpr int kAheadInCache = 512;

template <class Blocks>
struct Avx512VnniMicro {
  static constexpr int64_t kBlockBytes = Blocks::kBlockBytes;
  static constexpr int32_t kAdded = Blocks::kAdded;
  static constexpr int64_t kSegmentBlocks = 64;
  static constexpr int64_t kUnpackTokens = 12;
  // 12 tokens x 2 tiles are 24 sums in 32 registers; with one tile the broadcasts would be as many as the products and
  // the load ports the limit.
  static constexpr int64_t kUnpackTiles = 2;
  static constexpr int kPanelTokens = 12;

  static void unpack(const uint8_t* tile, int64_t blocks, uint8_t* bytes) {
    unpack_avx512<Blocks, kAheadInCache>(tile, blocks, bytes);
  }

  template <int T>
  W4A4_NOINLINE static void packed_tokens(const uint8_t* tile, int64_t blocks, const int8_t* q, int32_t* acc) {
    // The two halves of a block have sums of their own, and with few tokens even and odd blocks too, to hide the
    // latency of vpdpbusd.
    constexpr int kSets = T <= 2 ? 2 : 1;
    __m512i low[T][kSets], high[T][kSets];
    unrolled<T>([&](auto t) W4A4_INLINE {
      unrolled<kSets>([&](auto s) W4A4_INLINE { low[t][s] = high[t][s] = _mm512_setzero_si512(); });
    });
    const auto add_block = [&](auto s) W4A4_INLINE {
      const Bytes512 w = load_and_fetch<Blocks, kAheadInMemory>(tile);
      unrolled<T>([&](auto t) W4A4_INLINE {
        low[t][s] = pinned(_mm512_dpbusd_epi32(low[t][s], w.low, broadcast4(q + t * 4)));
        high[t][s] = pinned(_mm512_dpbusd_epi32(high[t][s], w.high, broadcast4(q + (T + t) * 4)));
      });
      tile += kBlockBytes;
      q += T * kBlockFeatures;
    };
    int64_t b = 0;
    for (; b + kSets <= blocks; b += kSets) unrolled<kSets>(add_block);
    for (; b < blocks; ++b) add_block(std::integral_constant<int, 0>{});
    unrolled<T>([&](auto t) W4A4_INLINE {
      unrolled<kSets>([&](auto s)
                          W4A4_INLINE { add_to(acc + t * kTileRows, _mm512_add_epi32(low[t][s], high[t][s])); });
    });
  }

  template <int T, int Tiles, bool kFetches>
  W4A4_NOINLINE static void unpacked_tokens(const uint8_t* bytes, int64_t blocks, const int8_t* q, int32_t* acc,
                                            int64_t acc_stride, NextWeights next) {
    const int64_t tile_bytes = blocks * kUnpackedBytes;
    __m512i sum[T][Tiles];
    unrolled<T>([&](auto t)
                    W4A4_INLINE { unrolled<Tiles>([&](auto i) W4A4_INLINE { sum[t][i] = _mm512_setzero_si512(); }); });
    for (int64_t block = 0; block < blocks; ++block) {
      if constexpr (kFetches) {
        // Into the second cache: the first one is full of unpacked weights and tokens.
        unrolled<Tiles * kBlockBytes / 64>([&](auto line) W4A4_INLINE {
          const uint8_t* tile = next.packed + line % Tiles * next.tile_bytes;
          _mm_prefetch(reinterpret_cast<const char*>(tile + line / Tiles * 64), _MM_HINT_T1);
        });
        next.packed += kBlockBytes;
      }
      unrolled<2>([&](auto) W4A4_INLINE {
        __m512i w[Tiles];
        unrolled<Tiles>([&](auto i) W4A4_INLINE { w[i] = _mm512_load_si512(bytes + i * tile_bytes); });
        unrolled<T>([&](auto t) W4A4_INLINE {
          const __m512i a = broadcast4(q + t * 4);
          unrolled<Tiles>([&](auto i) W4A4_INLINE { sum[t][i] = pinned(_mm512_dpbusd_epi32(sum[t][i], w[i], a)); });
        });
        bytes += 64;
        q += T * 4;
      });
    }
    unrolled<T>([&](auto t) W4A4_INLINE {
      unrolled<Tiles>([&](auto i) W4A4_INLINE { add_to(acc + i * acc_stride + t * kTileRows, sum[t][i]); });
    });
  }

  static void run_packed(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t tokens, int32_t* acc) {
    with_constant<kUnpackTokens - 1>(tokens, [&](auto t) { packed_tokens<t>(tile, blocks, q, acc); });
  }

  static void run_unpacked(const uint8_t* bytes, int64_t tiles, int64_t blocks, const int8_t* q, int64_t tokens,
                           int32_t* acc, int64_t acc_stride, NextWeights next) {
    with_constant<kPanelTokens>(tokens, [&](auto t) {
      with_constant<kUnpackTiles>(tiles, [&](auto n) {
        if (next.packed != nullptr) {
          unpacked_tokens<t, n, true>(bytes, blocks, q, acc, acc_stride, next);
        } else {
          unpacked_tokens<t, n, false>(bytes, blocks, q, acc, acc_stride, next);
        }
      });
    });
  }
};

}  // namespace

using Int4Micro = Avx512VnniMicro<Int4Blocks>;
using Int8Micro = Avx512VnniMicro<Int8Blocks>;
extern const Gemm gemm_avx512vnni{gemm<Int4Micro>, Int4Micro::kPanelTokens, 4};
extern const Gemm gemm_int8_avx512vnni{gemm<Int8Micro>, Int8Micro::kPanelTokens, 4};

}  // namespace w4a4
