// SPDX-License-Identifier: Apache-2.0
// smmla: a 2 x 2 tile of sums over 8 features, from 2 tokens x 8 and 2 rows x 8 bytes. A panel therefore holds 8
// features of a token at a time, and weights are zipped so that the low and high nibbles of a row are neighbours.
#define W4A4_VECTOR_FLOATS 4
#include <arm_neon.h>

#include "gemm_impl.h"

namespace w4a4 {
namespace {

constexpr int kRowPairs = kTileRows / 2;

struct NeonI8mmMicro {
  static constexpr int64_t kBlockBytes = w4a4::kBlockBytes;
  static constexpr int32_t kAdded = 0;
  static constexpr int64_t kSegmentBlocks = 64;
  static constexpr int64_t kUnpackTokens = 5;
  static constexpr int64_t kUnpackTiles = 1;
  static constexpr int kPanelTokens = 4;

  // A block as kRowPairs vectors of 2 rows x 8 features.
  W4A4_INLINE static void zip_block(const uint8_t* block, int8x16_t (&w)[kRowPairs]) {
    unrolled<kRowPairs / 2>([&](auto i) W4A4_INLINE {
      const uint8x16_t packed = vld1q_u8(block + i * 16);
      const uint32x4_t low = vreinterpretq_u32_u8(vandq_u8(packed, vdupq_n_u8(0xF)));
      const uint32x4_t high = vreinterpretq_u32_u8(vshrq_n_u8(packed, 4));
      w[2 * i] = vreinterpretq_s8_u32(vzip1q_u32(low, high));
      w[2 * i + 1] = vreinterpretq_s8_u32(vzip2q_u32(low, high));
    });
  }

  // One block for T tokens (q [T][8]); the missing partner of an odd last token is zero.
  template <int T>
  W4A4_INLINE static void add_block(const int8x16_t (&w)[kRowPairs], const int8_t* q,
                                    int32x4_t (&sum)[(T + 1) / 2][kRowPairs]) {
    unrolled<(T + 1) / 2>([&](auto pair) W4A4_INLINE {
      int8x16_t a;
      if constexpr (2 * decltype(pair)::value + 1 < T) {
        a = vld1q_s8(q + pair * 16);
      } else {
        a = vcombine_s8(vld1_s8(q + pair * 16), vdup_n_s8(0));
      }
      unrolled<kRowPairs>([&](auto r) W4A4_INLINE { sum[pair][r] = pinned(vmmlaq_s32(sum[pair][r], a, w[r])); });
    });
  }

  // A sum holds token 0 of rows 0, 1 and token 1 of rows 0, 1.
  template <int T>
  W4A4_INLINE static void add_to(int32_t* acc, const int32x4_t (&sum)[(T + 1) / 2][kRowPairs]) {
    unrolled<T>([&](auto t) W4A4_INLINE {
      unrolled<kRowPairs>([&](auto r) W4A4_INLINE {
        constexpr int kToken = decltype(t)::value;
        const int32x4_t both = sum[kToken / 2][r];
        const int32x2_t rows = kToken % 2 == 0 ? vget_low_s32(both) : vget_high_s32(both);
        int32_t* target = acc + t * kTileRows + r * 2;
        vst1_s32(target, vadd_s32(vld1_s32(target), rows));
      });
    });
  }

  static void unpack(const uint8_t* tile, int64_t blocks, uint8_t* bytes) {
    for (int64_t b = 0; b < blocks; ++b) {
      int8x16_t w[kRowPairs];
      zip_block(tile + b * kBlockBytes, w);
      for (int64_t r = 0; r < kRowPairs; ++r) {
        vst1q_s8(reinterpret_cast<int8_t*>(bytes) + b * kUnpackedBytes + r * 16, w[r]);
      }
    }
  }

  template <int T>
  W4A4_NOINLINE static void packed_tokens(const uint8_t* tile, int64_t blocks, const int8_t* q, int32_t* acc) {
    int32x4_t sum[(T + 1) / 2][kRowPairs] = {};
    for (int64_t b = 0; b < blocks; ++b, tile += kBlockBytes, q += T * kBlockFeatures) {
      __builtin_prefetch(tile + 1024);
      int8x16_t w[kRowPairs];
      zip_block(tile, w);
      add_block<T>(w, q, sum);
    }
    add_to<T>(acc, sum);
  }

  template <int T>
  W4A4_NOINLINE static void unpacked_tokens(const uint8_t* bytes, int64_t blocks, const int8_t* q, int32_t* acc) {
    int32x4_t sum[(T + 1) / 2][kRowPairs] = {};
    for (int64_t b = 0; b < blocks; ++b, bytes += kUnpackedBytes, q += T * kBlockFeatures) {
      int8x16_t w[kRowPairs];
      unrolled<kRowPairs>([&](auto r) W4A4_INLINE { w[r] = vreinterpretq_s8_u8(vld1q_u8(bytes + r * 16)); });
      add_block<T>(w, q, sum);
    }
    add_to<T>(acc, sum);
  }

  static void run_packed(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t tokens, int32_t* acc) {
    with_constant<kPanelTokens>(tokens, [&](auto t) { packed_tokens<t>(tile, blocks, q, acc); });
  }

  static void run_unpacked(const uint8_t* bytes, int64_t, int64_t blocks, const int8_t* q, int64_t tokens, int32_t* acc,
                           int64_t, NextWeights) {
    with_constant<kPanelTokens>(tokens, [&](auto t) { unpacked_tokens<t>(bytes, blocks, q, acc); });
  }
};

}  // namespace

extern const Gemm gemm_neon_i8mm{gemm<NeonI8mmMicro>, NeonI8mmMicro::kPanelTokens, 8};

}  // namespace w4a4
