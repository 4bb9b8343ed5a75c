// SPDX-License-Identifier: Apache-2.0
// The integer matrix product around a micro-kernel. Include it in one source file per instruction set.
//
// A Micro has
//   kBlockBytes      stored bytes of a block,
//   kAdded           what it adds to every stored weight before it multiplies,
//   kSegmentBlocks   blocks of 8 features it may sum before its accumulators must be widened,
//   kUnpackTokens    tokens from which on unpacking a tile once pays,
//   kUnpackTiles     tiles that run_unpacked takes at a time (or fewer, at the end),
//   run_packed(tile, blocks, q, tokens, acc)      acc[t][16] += stored . q over `blocks` packed blocks of a tile, for
//                                                 a panel q of `tokens` tokens,
//   unpack(tile, blocks, bytes)                   128 bytes per block, in an order of the Micro's own,
//   run_unpacked(bytes, tiles, blocks, q, tokens, acc, acc_stride, next)
//                                                 the same product from unpacked bytes; a tile's sums begin acc_stride
//                                                 after those of the one before. It may fetch what is unpacked next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "layout.h"
#include "vector.h"

namespace w4a4 {
namespace {

constexpr int64_t kUnpackedBytes = kTileRows * kBlockFeatures;
constexpr int kTileVectors = kTileRows / kVector;

// Tiles whose sums are kept at once: a segment of the activations then comes from memory once for all of them.
constexpr int64_t kTileBlock = 4;

// Packed weights that are needed soon: those of the first tile, and how far from it each following one is. Null if they
// are fetched already.
struct NextWeights {
  const uint8_t* packed;
  int64_t tile_bytes;
};

// Base of a Micro whose stored weights are bytes already.
struct NeverUnpacks {
  static constexpr int64_t kSegmentBlocks = 64;
  static constexpr int64_t kUnpackTokens = kMaxGemmTokens + 1;
  static constexpr int64_t kUnpackTiles = 1;
  static void unpack(const uint8_t*, int64_t, uint8_t*) {}
  static void run_unpacked(const uint8_t*, int64_t, int64_t, const int8_t*, int64_t, int32_t*, int64_t, NextWeights) {}
};

// Four activation bytes as one word, for a broadcast.
inline int32_t load_word(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

W4A4_INLINE inline WordVector load_words(const void* p) {
  WordVector words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

// Brings what dequantizes a tile into the cache, up to a limit that is one line for weights with one group.
inline void fetch_scales(const GemmArgs& args, int64_t tile) {
  const int64_t first = tile * kTileRows * args.groups;
  for (const float* values : {args.weight_scale, args.weight_offset}) {
    if (values == nullptr) continue;
    for (int64_t i = 0; i < std::min<int64_t>(args.groups, 8); ++i) __builtin_prefetch(values + first + i * kTileRows);
  }
  if (args.bias != nullptr) __builtin_prefetch(args.bias + tile * kTileRows);
}

// What dequantizes one group of a tile's rows.
struct TileGroup {
  alignas(64) float scale[kTileRows] = {}, offset[kTileRows] = {};
  alignas(64) uint32_t quant_bias[kTileRows] = {};

  TileGroup(const GemmArgs& args, int64_t tile, int64_t group) {
    const int64_t rows = std::min(kTileRows, args.out_features - tile * kTileRows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t index = (tile * kTileRows + r) * args.groups + group;
      scale[r] = args.weight_scale[index];
      if (args.weight_offset != nullptr) offset[r] = args.weight_offset[index];
      if (args.quant_bias != nullptr) quant_bias[r] = static_cast<uint32_t>(args.quant_bias[tile * kTileRows + r]);
    }
  }
};

// Adds one group's dequantized part: sum[t][r] += weight_scale * (acc - (zero_point + offset) * sum(q) + quant_bias).
void add_group(const GemmArgs& args, const TileGroup& weight, int32_t zero_point, int64_t group, int64_t begin,
               int64_t tokens, const int32_t* acc, float* sum) {
  for (int64_t t = 0; t < tokens; ++t, acc += kTileRows, sum += kTileRows) {
    const int32_t q_sum = args.q_sums[(begin + t) * args.groups + group];
    // The stored zero point is removed in integers, exactly and modulo 2^32; only a checkpoint's own offset is a float.
    const uint32_t correction = static_cast<uint32_t>(zero_point) * static_cast<uint32_t>(q_sum);
    const FloatVector float_sum = broadcast(static_cast<float>(q_sum));
    unrolled<kTileVectors>([&](auto v) W4A4_INLINE {
      constexpr int kFirst = v * kVector;
      const WordVector product = load_words(acc + kFirst) - correction + load_words(weight.quant_bias + kFirst);
      const FloatVector exact = __builtin_convertvector(reinterpret_cast<const IntVector&>(product), FloatVector);
      store(sum + kFirst,
            load(sum + kFirst) + load(weight.scale + kFirst) * (exact - load(weight.offset + kFirst) * float_sum));
    });
  }
}

// The last step for one tile: y = scale * sum + bias, in the output dtype.
struct TileOutput {
  alignas(64) float bias[kTileRows] = {};
  int64_t rows, stride, size;
  Dtype dtype;
  const float* scale;
  char* y;

  TileOutput(const GemmArgs& args, int64_t tile)
      : rows(std::min(kTileRows, args.out_features - tile * kTileRows)),
        stride(args.out_features * dtype_size(args.dtype)),
        size(dtype_size(args.dtype)),
        dtype(args.dtype),
        scale(args.scale),
        y(static_cast<char*>(args.y) + tile * kTileRows * size) {
    if (args.bias != nullptr) std::memcpy(bias, args.bias + tile * kTileRows, rows * sizeof(float));
  }

  W4A4_INLINE void store_token(int64_t token, const float* sum) const {
    const FloatVector token_scale = broadcast(scale[token]);
    char* target = y + token * stride;
    const auto row = [&](auto v)
                         W4A4_INLINE { return token_scale * load(sum + v * kVector) + load(bias + v * kVector); };
    if (rows == kTileRows) {
      unrolled<kTileVectors>([&](auto v) W4A4_INLINE { store_vector(row(v), dtype, target + v * kVector * size); });
    } else {
      float values[kTileRows];
      unrolled<kTileVectors>([&](auto v) W4A4_INLINE { store(values + v * kVector, row(v)); });
      store_floats(values, rows, dtype, target);
    }
  }
};

template <class Micro>
void gemm(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, int64_t panel_begin, int64_t panel_end) {
  const Panels& panels = args.panels;
  const int64_t begin = panels.begin(panel_begin), tokens = panels.begin(panel_end) - begin;
  const int64_t sums_per_tile = tokens * kTileRows;
  const int64_t blocks = block_count(args.in_features), stride = token_stride(args.in_features);
  // Groups end at block boundaries (checked by the caller), so a block belongs to one group.
  const int64_t group_blocks = ceil_div(blocks, args.groups);
  const bool unpacks = tokens >= Micro::kUnpackTokens;
  // A single stream of weights is fastest from memory; with many tokens the weights matter less than the activations.
  const int64_t tile_step = unpacks ? kTileBlock : 1;
  alignas(64) int32_t acc[kTileBlock * kMaxGemmTokens * kTileRows];
  alignas(64) float sum[kTileBlock * kMaxGemmTokens * kTileRows];
  alignas(64) uint8_t bytes[Micro::kUnpackTiles * Micro::kSegmentBlocks * kUnpackedBytes];

  for (int64_t tile = tile_begin; tile < tile_end; tile += tile_step) {
    const int64_t tiles = std::min(tile_step, tile_end - tile);
    const auto packed = [&](int64_t i, int64_t block) {
      return static_cast<const uint8_t*>(args.packed) + ((tile + i) * blocks + block) * Micro::kBlockBytes;
    };
    // Each tile has a few scales, far from those of the one before: no hardware fetches them in time.
    for (int64_t i = 0; i < tiles; ++i) fetch_scales(args, tile + i);
    std::memset(sum, 0, tiles * sums_per_tile * sizeof(float));
    for (int64_t group = 0; group < args.groups; ++group) {
      const int64_t group_end = std::min((group + 1) * group_blocks, blocks);
      std::memset(acc, 0, tiles * sums_per_tile * sizeof(int32_t));
      for (int64_t block = group * group_blocks; block < group_end; block += Micro::kSegmentBlocks) {
        const int64_t count = std::min<int64_t>(Micro::kSegmentBlocks, group_end - block);
        for (int64_t i = 0; i < tiles; i += Micro::kUnpackTiles) {
          const int64_t together = std::min<int64_t>(Micro::kUnpackTiles, tiles - i);
          const int64_t following = i + together, end = block + count;
          const NextWeights next{following < tiles ? packed(following, block)
                                 : end < blocks    ? packed(0, end)
                                                   : packed(tiles, 0),
                                 blocks * Micro::kBlockBytes};
          if (unpacks) {
            for (int64_t j = 0; j < together; ++j)
              Micro::unpack(packed(i + j, block), count, bytes + j * count * kUnpackedBytes);
          }
          for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
            const int64_t first = panels.begin(panel), size = panels.size(panel);
            const int8_t* q = args.q + first * stride + block * size * kBlockFeatures;
            int32_t* target = acc + i * sums_per_tile + (first - begin) * kTileRows;
            if (unpacks) {
              Micro::run_unpacked(bytes, together, count, q, size, target, sums_per_tile,
                                  panel == panel_begin ? next : NextWeights{});
            } else {
              for (int64_t j = 0; j < together; ++j) {
                Micro::run_packed(packed(i + j, block), count, q, size, target + j * sums_per_tile);
              }
            }
          }
        }
      }
      for (int64_t i = 0; i < tiles; ++i) {
        add_group(args, TileGroup(args, tile + i, group), args.zero_point + Micro::kAdded, group, begin, tokens,
                  acc + i * sums_per_tile, sum + i * sums_per_tile);
      }
    }
    for (int64_t i = 0; i < tiles; ++i) {
      const TileOutput output(args, tile + i);
      for (int64_t token = 0; token < tokens; ++token) {
        output.store_token(begin + token, sum + i * sums_per_tile + token * kTileRows);
      }
    }
  }
}

}  // namespace
}  // namespace w4a4
