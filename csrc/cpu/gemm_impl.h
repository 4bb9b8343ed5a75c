// SPDX-License-Identifier: Apache-2.0
// The integer matrix product around a micro-kernel. Include it in one source file per instruction set.
//
// A Micro has
//   kBlockBytes      stored bytes of a block,
//   kSegmentBlocks   blocks of 8 features it may sum before its accumulators must be widened,
//   kUnpackTokens    tokens from which on unpacking a tile once pays,
//   run_packed(tile, blocks, q, q_stride, tokens, acc)      acc[t][16] += stored . q over `blocks` packed blocks,
//   unpack(tile, blocks, bytes)                             128 bytes per block: 16 x 4 features, then 16 x 4,
//   run_unpacked(bytes, blocks, q, q_stride, tokens, acc)   the same product from unpacked bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "layout.h"
#include "vector.h"

namespace w4a4 {
namespace {

// Base of a Micro whose stored weights are bytes already.
struct NeverUnpacks {
  static constexpr int64_t kSegmentBlocks = 64;
  static constexpr int64_t kUnpackTokens = kMaxGemmTokens + 1;
  static void unpack(const uint8_t*, int64_t, uint8_t*) {}
  static void run_unpacked(const uint8_t*, int64_t, const int8_t*, int64_t, int64_t, int32_t*) {}
};

// Adds one group's dequantized part: sum[t][r] += weight_scale * (acc - (zero_point + offset) * sum(q)).
void add_group(const GemmArgs& args, int64_t tile, int64_t group, int64_t begin, int64_t tokens, const int32_t* acc,
               float* sum) {
  const int64_t rows = std::min(kTileRows, args.out_features - tile * kTileRows);
  float scale[kTileRows] = {}, zero_point[kTileRows] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t index = (tile * kTileRows + r) * args.groups + group;
    scale[r] = args.weight_scale[index];
    zero_point[r] = args.weight_offset != nullptr ? args.weight_offset[index] : 0.0f;
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const int32_t q_sum = args.q_sums[(begin + t) * args.groups + group];
    for (int64_t r = 0; r < kTileRows; ++r) {
      // The stored zero point is removed in integers, exactly; only a checkpoint's own offset is a float.
      const auto exact = static_cast<float>(acc[t * kTileRows + r] - args.zero_point * q_sum);
      sum[t * kTileRows + r] += scale[r] * (exact - zero_point[r] * static_cast<float>(q_sum));
    }
  }
}

// y = scale * sum + bias for one tile, in the output dtype.
void store_tile(const GemmArgs& args, int64_t tile, int64_t begin, int64_t tokens, const float* sum) {
  const int64_t first = tile * kTileRows;
  const int64_t rows = std::min(kTileRows, args.out_features - first);
  float bias[kTileRows] = {};
  if (args.bias != nullptr) std::memcpy(bias, args.bias + first, rows * sizeof(float));
  char* y = static_cast<char*>(args.y);
  for (int64_t t = 0; t < tokens; ++t) {
    float row[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) row[r] = args.scale[begin + t] * sum[t * kTileRows + r] + bias[r];
    const int64_t index = (begin + t) * args.out_features + first;
    store_floats(row, rows, args.dtype, y + index * dtype_size(args.dtype));
  }
}

template <class Micro>
void gemm(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, int64_t begin, int64_t end) {
  const int64_t tokens = end - begin;
  const int64_t blocks = block_count(args.in_features);
  // Groups end at block boundaries (checked by the caller), so a block belongs to one group.
  const int64_t group_blocks = ceil_div(blocks, args.groups);
  const int8_t* q = args.q + begin * args.q_stride;
  alignas(64) int32_t acc[kMaxGemmTokens * kTileRows];
  alignas(64) float sum[kMaxGemmTokens * kTileRows];
  alignas(64) uint8_t bytes[Micro::kSegmentBlocks * kTileRows * kBlockFeatures];
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const uint8_t* packed = static_cast<const uint8_t*>(args.packed) + tile * blocks * Micro::kBlockBytes;
    std::memset(sum, 0, tokens * kTileRows * sizeof(float));
    for (int64_t group = 0; group < args.groups; ++group) {
      const int64_t group_end = std::min((group + 1) * group_blocks, blocks);
      std::memset(acc, 0, tokens * kTileRows * sizeof(int32_t));
      for (int64_t block = group * group_blocks; block < group_end; block += Micro::kSegmentBlocks) {
        const int64_t count = std::min<int64_t>(Micro::kSegmentBlocks, group_end - block);
        const uint8_t* segment = packed + block * Micro::kBlockBytes;
        const int8_t* q_segment = q + block * kBlockFeatures;
        if (tokens < Micro::kUnpackTokens) {
          Micro::run_packed(segment, count, q_segment, args.q_stride, tokens, acc);
        } else {
          Micro::unpack(segment, count, bytes);
          Micro::run_unpacked(bytes, count, q_segment, args.q_stride, tokens, acc);
        }
      }
      add_group(args, tile, group, begin, tokens, acc, sum);
    }
    store_tile(args, tile, begin, tokens, sum);
  }
}

}  // namespace
}  // namespace w4a4
