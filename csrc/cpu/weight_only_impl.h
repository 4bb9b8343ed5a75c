// SPDX-License-Identifier: Apache-2.0
// The product of float activations with int8 or int4 weights. Include it after transform_impl.h, whose register blocks
// it uses, in one source file per instruction set.
//
// A segment of a tile is turned into floats once and multiplied with all tokens of a chunk while it is in the cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layout.h"
#include "transform_impl.h"

namespace w4a4 {
namespace {

constexpr int64_t kFloatSegmentBlocks = 32;  // 16 KiB of floats

// `blocks` packed blocks of a tile as floats [blocks * 8, 16], less the offset of each row.
template <bool kIsInt4>
void unpack_floats(const uint8_t* packed, int64_t blocks, const float* offset, float* target) {
  constexpr int64_t kFeaturesPerByteColumn = kIsInt4 ? 2 : 1;
  const int64_t quads = blocks * 2 / kFeaturesPerByteColumn;  // 64 bytes: a word of 4 bytes for each of 16 rows
  for (int64_t quad = 0; quad < quads; ++quad, packed += 64, target += 4 * kFeaturesPerByteColumn * kTileRows) {
    for (int64_t row = 0; row < kTileRows; row += kVector) {
      IntVector words;
      std::memcpy(&words, packed + 4 * row, sizeof words);
      const FloatVector zero_point = load(offset + row);
      for (int feature = 0; feature < 4; ++feature) {
        float* place = target + feature * kTileRows + row;
        if constexpr (kIsInt4) {
          const IntVector low = (words >> (8 * feature) & 15) - kZeroPoint;
          const IntVector high = (words >> (8 * feature + 4) & 15) - kZeroPoint;
          store(place, __builtin_convertvector(low, FloatVector) - zero_point);
          store(place + 4 * kTileRows, __builtin_convertvector(high, FloatVector) - zero_point);
        } else {
          const IntVector value = words << (24 - 8 * feature) >> 24;
          store(place, __builtin_convertvector(value, FloatVector) - zero_point);
        }
      }
    }
  }
}

// One row per output feature of the tile: its scale and its offset in a group, 0 beyond the last.
void group_constants(const WeightOnlyArgs& args, int64_t tile, int64_t group, float* scale, float* offset) {
  const int64_t rows = std::min(kTileRows, args.out_features - tile * kTileRows);
  for (int64_t r = 0; r < kTileRows; ++r) {
    const int64_t index = (tile * kTileRows + r) * args.groups + group;
    scale[r] = r < rows ? args.weight_scale[index] : 0.0f;
    offset[r] = r < rows && args.weight_offset != nullptr ? args.weight_offset[index] : 0.0f;
  }
}

template <bool kIsInt4>
void weight_only_tile(const WeightOnlyArgs& args, int64_t tile) {
  constexpr int64_t kBytes = kIsInt4 ? kBlockBytes : kInt8BlockBytes;
  const int64_t blocks = block_count(args.in_features), group_size = args.in_features / args.groups;
  const auto* packed = static_cast<const uint8_t*>(args.packed) + tile * blocks * kBytes;
  alignas(64) float weight[kFloatSegmentBlocks * kBlockFeatures * kTileRows];
  alignas(64) float product[kWeightOnlyTokens * kTileRows], sum[kWeightOnlyTokens * kTileRows] = {};
  alignas(64) float scale[kTileRows], offset[kTileRows];

  for (int64_t group = 0; group < args.groups; ++group) {
    group_constants(args, tile, group, scale, offset);
    for (int64_t k = group * group_size; k < (group + 1) * group_size; k += kFloatSegmentBlocks * kBlockFeatures) {
      const int64_t depth = std::min(kFloatSegmentBlocks * kBlockFeatures, (group + 1) * group_size - k);
      unpack_floats<kIsInt4>(packed + k / kBlockFeatures * kBytes, ceil_div(depth, kBlockFeatures), offset, weight);
      multiply(args.x + k, args.in_features, 1, args.tokens, weight, kTileRows, depth, kTileRows, product, kTileRows);
      for (int64_t t = 0; t < args.tokens; ++t) {
        for (int64_t r = 0; r < kTileRows; ++r) sum[t * kTileRows + r] += scale[r] * product[t * kTileRows + r];
      }
    }
  }
  const int64_t first = tile * kTileRows, rows = std::min(kTileRows, args.out_features - first);
  for (int64_t t = 0; t < args.tokens; ++t) {
    float* row = sum + t * kTileRows;
    for (int64_t r = 0; args.bias != nullptr && r < rows; ++r) row[r] += args.bias[first + r];
    store_floats(row, rows, args.dtype,
                 static_cast<char*>(args.y) + (t * args.out_features + first) * dtype_size(args.dtype));
  }
}

void weight_only(const WeightOnlyArgs& args, int64_t tile_begin, int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    args.is_int4 ? weight_only_tile<true>(args, tile) : weight_only_tile<false>(args, tile);
  }
}

}  // namespace
}  // namespace w4a4
