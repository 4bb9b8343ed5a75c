// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 4
#include "gemm_impl.h"

namespace w4a4 {
namespace {

// acc[t][r] += sum over features of bytes . q, four features at a time: half a block.
template <class Byte>
void add_products(const Byte* bytes, int64_t blocks, const int8_t* q, int64_t tokens, int32_t* acc) {
  for (int64_t half = 0; half < 2 * blocks; ++half) {
    const Byte* w = bytes + half * kTileRows * 4;
    for (int64_t t = 0; t < tokens; ++t) {
      const int8_t* a = q + (half * tokens + t) * 4;
      int32_t* sum = acc + t * kTileRows;
      for (int64_t r = 0; r < kTileRows; ++r) {
        sum[r] += w[4 * r] * a[0] + w[4 * r + 1] * a[1] + w[4 * r + 2] * a[2] + w[4 * r + 3] * a[3];
      }
    }
  }
}

struct PortableMicro {
  static constexpr int64_t kBlockBytes = w4a4::kBlockBytes;
  static constexpr int32_t kAdded = 0;
  static constexpr int64_t kSegmentBlocks = 64;
  static constexpr int64_t kUnpackTokens = 2;
  static constexpr int64_t kUnpackTiles = 1;
  static constexpr int kPanelTokens = 4;

  static void unpack(const uint8_t* tile, int64_t blocks, uint8_t* bytes) {
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < kBlockBytes; ++i) {
        bytes[b * 2 * kBlockBytes + i] = tile[b * kBlockBytes + i] & 0xF;
        bytes[b * 2 * kBlockBytes + kBlockBytes + i] = tile[b * kBlockBytes + i] >> 4;
      }
    }
  }

  static void run_unpacked(const uint8_t* bytes, int64_t, int64_t blocks, const int8_t* q, int64_t tokens, int32_t* acc,
                           int64_t, NextWeights) {
    add_products(bytes, blocks, q, tokens, acc);
  }

  static void run_packed(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t tokens, int32_t* acc) {
    uint8_t bytes[kSegmentBlocks * kUnpackedBytes];
    unpack(tile, blocks, bytes);
    add_products(bytes, blocks, q, tokens, acc);
  }
};

struct PortableInt8Micro : NeverUnpacks {
  static constexpr int64_t kBlockBytes = kInt8BlockBytes;
  static constexpr int32_t kAdded = 0;

  static void run_packed(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t tokens, int32_t* acc) {
    add_products(reinterpret_cast<const int8_t*>(tile), blocks, q, tokens, acc);
  }
};

}  // namespace

extern const Gemm gemm_portable{gemm<PortableMicro>, PortableMicro::kPanelTokens, 4};
extern const Gemm gemm_int8_portable{gemm<PortableInt8Micro>, PortableMicro::kPanelTokens, 4};

}  // namespace w4a4
