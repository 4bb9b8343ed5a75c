// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 4
#include "gemm_impl.h"

namespace w4a4 {
namespace {

struct PortableMicro {
  static constexpr int64_t kBlockBytes = w4a4::kBlockBytes;
  static constexpr int64_t kSegmentBlocks = 64;
  static constexpr int64_t kUnpackTokens = 2;

  static void unpack(const uint8_t* tile, int64_t blocks, uint8_t* bytes) {
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < kBlockBytes; ++i) {
        bytes[b * 2 * kBlockBytes + i] = tile[b * kBlockBytes + i] & 0xF;
        bytes[b * 2 * kBlockBytes + kBlockBytes + i] = tile[b * kBlockBytes + i] >> 4;
      }
    }
  }

  template <class Byte>
  static void run_bytes(const Byte* bytes, int64_t blocks, const int8_t* q, int64_t q_stride, int64_t tokens,
                        int32_t* acc) {
    for (int64_t t = 0; t < tokens; ++t) {
      int32_t* sum = acc + t * kTileRows;
      // Four features at a time: half a block.
      for (int64_t half = 0; half < 2 * blocks; ++half) {
        const Byte* w = bytes + half * kBlockBytes;
        const int8_t* a = q + t * q_stride + half * 4;
        for (int64_t r = 0; r < kTileRows; ++r) {
          sum[r] += w[4 * r] * a[0] + w[4 * r + 1] * a[1] + w[4 * r + 2] * a[2] + w[4 * r + 3] * a[3];
        }
      }
    }
  }

  static void run_unpacked(const uint8_t* bytes, int64_t blocks, const int8_t* q, int64_t q_stride, int64_t tokens,
                           int32_t* acc) {
    run_bytes(bytes, blocks, q, q_stride, tokens, acc);
  }

  static void run_packed(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int64_t tokens,
                         int32_t* acc) {
    uint8_t bytes[kSegmentBlocks * 2 * kBlockBytes];
    unpack(tile, blocks, bytes);
    run_unpacked(bytes, blocks, q, q_stride, tokens, acc);
  }
};

struct PortableInt8Micro : NeverUnpacks {
  static constexpr int64_t kBlockBytes = kInt8BlockBytes;

  static void run_packed(const uint8_t* tile, int64_t blocks, const int8_t* q, int64_t q_stride, int64_t tokens,
                         int32_t* acc) {
    PortableMicro::run_bytes(reinterpret_cast<const int8_t*>(tile), blocks, q, q_stride, tokens, acc);
  }
};

}  // namespace

void gemm_int8_portable(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, int64_t begin, int64_t end) {
  gemm<PortableInt8Micro>(args, tile_begin, tile_end, begin, end);
}

void gemm_portable(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, int64_t begin, int64_t end) {
  gemm<PortableMicro>(args, tile_begin, tile_end, begin, end);
}

}  // namespace w4a4
