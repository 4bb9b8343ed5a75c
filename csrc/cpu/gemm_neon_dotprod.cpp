// SPDX-License-Identifier: Apache-2.0
// sdot: four signed products into 32 bits for each of four rows. Unpacked weights, 0..15, fit into signed bytes.
#define W4A4_VECTOR_FLOATS 4
#include <arm_neon.h>

#include "gemm_impl.h"

namespace w4a4 {
namespace {

constexpr int kRowVectors = kTileRows / 4;

struct NeonDotprodMicro {
  static constexpr int64_t kBlockBytes = w4a4::kBlockBytes;
  static constexpr int32_t kAdded = 0;
  static constexpr int64_t kSegmentBlocks = 64;
  static constexpr int64_t kUnpackTokens = 5;
  static constexpr int64_t kUnpackTiles = 1;
  static constexpr int kPanelTokens = 4;

  // One half block: 4 features of 16 rows (w) for T tokens (q [T][4]).
  template <int T>
  W4A4_INLINE static void add_half(const int8x16_t (&w)[kRowVectors], const int8_t* q,
                                   int32x4_t (&sum)[T][kRowVectors]) {
    if constexpr (T == 4) {
      const int8x16_t a = vld1q_s8(q);
      unrolled<T>([&](auto t) W4A4_INLINE {
        unrolled<kRowVectors>(
            [&](auto r) W4A4_INLINE { sum[t][r] = pinned(vdotq_laneq_s32(sum[t][r], w[r], a, decltype(t)::value)); });
      });
    } else {
      unrolled<T>([&](auto t) W4A4_INLINE {
        const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(load_word(q + t * 4)));
        unrolled<kRowVectors>([&](auto r) W4A4_INLINE { sum[t][r] = pinned(vdotq_s32(sum[t][r], w[r], a)); });
      });
    }
  }

  template <int T>
  W4A4_INLINE static void add_to(int32_t* acc, const int32x4_t (&sum)[T][kRowVectors]) {
    unrolled<T>([&](auto t) W4A4_INLINE {
      unrolled<kRowVectors>([&](auto r) W4A4_INLINE {
        int32_t* target = acc + t * kTileRows + r * 4;
        vst1q_s32(target, vaddq_s32(vld1q_s32(target), sum[t][r]));
      });
    });
  }

  static void unpack(const uint8_t* tile, int64_t blocks, uint8_t* bytes) {
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < kRowVectors; ++i) {
        const uint8x16_t packed = vld1q_u8(tile + b * kBlockBytes + i * 16);
        vst1q_u8(bytes + b * kUnpackedBytes + i * 16, vandq_u8(packed, vdupq_n_u8(0xF)));
        vst1q_u8(bytes + b * kUnpackedBytes + kBlockBytes + i * 16, vshrq_n_u8(packed, 4));
      }
    }
  }

  template <int T>
  W4A4_NOINLINE static void packed_tokens(const uint8_t* tile, int64_t blocks, const int8_t* q, int32_t* acc) {
    int32x4_t sum[T][kRowVectors] = {};
    for (int64_t b = 0; b < blocks; ++b, tile += kBlockBytes, q += T * kBlockFeatures) {
      __builtin_prefetch(tile + 1024);
      int8x16_t low[kRowVectors], high[kRowVectors];
      unrolled<kRowVectors>([&](auto r) W4A4_INLINE {
        const uint8x16_t packed = vld1q_u8(tile + r * 16);
        low[r] = vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(0xF)));
        high[r] = vreinterpretq_s8_u8(vshrq_n_u8(packed, 4));
      });
      add_half<T>(low, q, sum);
      add_half<T>(high, q + T * 4, sum);
    }
    add_to<T>(acc, sum);
  }

  template <int T>
  W4A4_NOINLINE static void unpacked_tokens(const uint8_t* bytes, int64_t blocks, const int8_t* q, int32_t* acc) {
    int32x4_t sum[T][kRowVectors] = {};
    for (int64_t half = 0; half < 2 * blocks; ++half, bytes += kBlockBytes, q += T * 4) {
      int8x16_t w[kRowVectors];
      unrolled<kRowVectors>([&](auto r) W4A4_INLINE { w[r] = vreinterpretq_s8_u8(vld1q_u8(bytes + r * 16)); });
      add_half<T>(w, q, sum);
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

extern const Gemm gemm_neon_dotprod{gemm<NeonDotprodMicro>, NeonDotprodMicro::kPanelTokens, 4};

}  // namespace w4a4
