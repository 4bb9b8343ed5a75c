// SPDX-License-Identifier: Apache-2.0
// tdpbsud on tiles: 16 tokens x 64 features times 64 features x 16 rows in one instruction. Eight unpacked blocks of a
// weight tile are a tile operand as they are, and so is a panel's unit of activations.
#define W4A4_VECTOR_FLOATS 16
#include <immintrin.h>

#include <optional>

#include "gemm_impl.h"
#include "tiles.h"
#include "unpack_avx512.h"

namespace w4a4 {
namespace {

constexpr int64_t kChunkFeatures = kTokenAlignment;
constexpr int64_t kChunkBlocks = kChunkFeatures / kBlockFeatures;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileSums = 256;
constexpr int64_t kPanelTokens = 16;
// Chunks of two weight tiles that are unpacked at once: 16 KB, which stay in the first-level cache while as much of
// every two panels streams past them. Twice as many are a fifth slower.
constexpr int64_t kSegmentChunks = 8;
// Weight tiles and panels that share their loads. Two by two tiles of sums need as many loads as products; with one by
// two the loads would be the limit.
constexpr int64_t kTogether = 2;
// Activations beyond this do not stay in the second-level cache, and are better brought there once for many weight
// tiles than once for each pair, even though the sums then fill half of it.
constexpr int64_t kCachedBytes = 768 * 1024;
constexpr int64_t kFewTiles = 8, kManyTiles = 32;

// acc[p][i] (+)= panel p times weight tile i, over `chunks` chunks; 16 x 16 sums each. A panel of fewer than 16 tokens
// is read beyond its end; the sums of those rows are never used. The compiler does not know that tile instructions
// touch memory: the barriers, around a function that is not inlined, keep its loads and stores on their side.
template <int Panels, int Tiles>
W4A4_NOINLINE void multiply_tiles(const int8_t* const* q, const int64_t* q_step, const uint8_t* bytes, int64_t chunks,
                                  bool is_first, int32_t* acc) {
  asm volatile("" ::: "memory");
  constexpr int kRow = 64;
  constexpr int64_t kPanelSums = kTogether * kTileSums;
  if (is_first) {
    _tile_zero(0);
    if constexpr (Tiles == 2) _tile_zero(1);
    if constexpr (Panels == 2) _tile_zero(2);
    if constexpr (Panels == 2 && Tiles == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, acc, kRow);
    if constexpr (Tiles == 2) _tile_loadd(1, acc + kTileSums, kRow);
    if constexpr (Panels == 2) _tile_loadd(2, acc + kPanelSums, kRow);
    if constexpr (Panels == 2 && Tiles == 2) _tile_loadd(3, acc + kPanelSums + kTileSums, kRow);
  }
  const int8_t *first = q[0], *second = Panels == 2 ? q[1] : nullptr;
  const uint8_t* other = bytes + chunks * kTileBytes;
  for (int64_t chunk = 0; chunk < chunks; ++chunk, bytes += kTileBytes, other += kTileBytes) {
    _tile_loadd(4, first, kRow);
    _tile_loadd(6, bytes, kRow);
    _tile_dpbsud(0, 4, 6);
    if constexpr (Panels == 2) {
      _tile_loadd(5, second, kRow);
      _tile_dpbsud(2, 5, 6);
    }
    if constexpr (Tiles == 2) {
      _tile_loadd(7, other, kRow);
      _tile_dpbsud(1, 4, 7);
    }
    if constexpr (Panels == 2 && Tiles == 2) _tile_dpbsud(3, 5, 7);
    first += q_step[0];
    if constexpr (Panels == 2) second += q_step[1];
  }
  _tile_stored(0, acc, kRow);
  if constexpr (Tiles == 2) _tile_stored(1, acc + kTileSums, kRow);
  if constexpr (Panels == 2) _tile_stored(2, acc + kPanelSums, kRow);
  if constexpr (Panels == 2 && Tiles == 2) _tile_stored(3, acc + kPanelSums + kTileSums, kRow);
  asm volatile("" ::: "memory");
}

// A segment of a weight tile as unsigned bytes, zeros beyond its blocks.
template <class Blocks>
void unpack_segment(const uint8_t* packed, int64_t blocks, int64_t chunks, uint8_t* bytes) {
  unpack_avx512<Blocks, kAheadInMemory>(packed, blocks, bytes);
  std::memset(bytes + blocks * kUnpackedBytes, 0, chunks * kTileBytes - blocks * kUnpackedBytes);
}

// The unpacked segment of `tiles` weight tiles, and where it lies in a token.
struct Segment {
  const uint8_t* bytes;
  int64_t tiles, first_chunk, chunks;
  bool is_first;  // of its group
};

// `count` panels from `panel` on, at most kTogether, times a segment.
void multiply_segment(const GemmArgs& args, const Segment& segment, int64_t panel, int64_t count, int32_t* acc) {
  const int8_t* q[kTogether];
  int64_t q_step[kTogether];
  for (int64_t p = 0; p < count; ++p) {
    q_step[p] = args.panels.size(panel + p) * kChunkFeatures;
    q[p] = args.q + args.panels.begin(panel + p) * token_stride(args.in_features) + segment.first_chunk * q_step[p];
  }
  with_constant<kTogether>(count, [&](auto panels) {
    with_constant<kTogether>(segment.tiles, [&](auto tiles) {
      multiply_tiles<panels, tiles>(q, q_step, segment.bytes, segment.chunks, segment.is_first, acc);
    });
  });
}

// The sums of one call: [pairs of weight tiles][panels][2 weight tiles][16 tokens][16 rows].
struct Sums {
  int64_t panel_begin, panels;
  int64_t size(int64_t tiles) const { return ceil_div(tiles, kTogether) * panels * kTogether * kTileSums; }
  int64_t at(int64_t tile, int64_t panel) const {
    return ((tile / kTogether * panels + panel - panel_begin) * kTogether + tile % kTogether) * kTileSums;
  }
};

// Asks for the lines of y that two panels and two weight tiles will be written to, while tiles are multiplied.
void prefetch_outputs(const GemmArgs& args, int64_t tile, int64_t panel, int64_t panel_count) {
  const int64_t size = dtype_size(args.dtype), stride = args.out_features * size;
  const int64_t begin = args.panels.begin(panel), end = args.panels.begin(panel + panel_count);
  const int64_t bytes = std::min(kTogether * kTileRows, args.out_features - tile * kTileRows) * size;
  for (int64_t token = begin; token < end; ++token) {
    const char* y = static_cast<const char*>(args.y) + token * stride + tile * kTileRows * size;
    for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(y + offset, 1);
  }
}

template <class Blocks>
void gemm_tiles(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, int64_t panel_begin, int64_t panel_end) {
  const Panels& panels = args.panels;
  const int64_t blocks = block_count(args.in_features);
  // Groups are whole chunks, unless there is but one; see Gemm::choose.
  const int64_t group_blocks = ceil_div(blocks, args.groups), group_chunks = ceil_div(group_blocks, kChunkBlocks);
  const int64_t token_bytes = token_stride(args.in_features) * (panels.begin(panel_end) - panels.begin(panel_begin));
  const int64_t most_tiles = token_bytes > kCachedBytes ? kManyTiles : kFewTiles;
  const Sums sums{panel_begin, panel_end - panel_begin};
  const int64_t count = sums.size(std::min(most_tiles, tile_end - tile_begin));
  auto* acc = static_cast<int32_t*>(thread_scratch(2 * count * sizeof(float)));
  auto* sum = reinterpret_cast<float*>(acc + count);
  alignas(64) uint8_t bytes[kTogether * kSegmentChunks * kTileBytes];
  const Tiles configured;

  const auto add =
      [&](const TileGroup& weight, int64_t group, int64_t first, int64_t tokens, const int32_t* from, float* to)
          W4A4_INLINE { add_group(args, weight, args.zero_point + Blocks::kAdded, group, first, tokens, from, to); };
  for (int64_t first_tile = tile_begin; first_tile < tile_end; first_tile += most_tiles) {
    const int64_t tiles = std::min(most_tiles, tile_end - first_tile);
    if (args.groups > 1) std::memset(sum, 0, sums.size(tiles) * sizeof(float));
    for (int64_t group = 0; group < args.groups; ++group) {
      for (int64_t begin = 0; begin < group_chunks; begin += kSegmentChunks) {
        const int64_t chunks = std::min(kSegmentChunks, group_chunks - begin);
        const int64_t first_chunk = group * group_chunks + begin, block = first_chunk * kChunkBlocks;
        const int64_t segment_blocks = std::min(chunks * kChunkBlocks, blocks - block);
        const bool is_last = group + 1 == args.groups && begin + chunks == group_chunks;
        for (int64_t i = 0; i < tiles; i += kTogether) {
          const int64_t together = std::min(kTogether, tiles - i);
          for (int64_t j = 0; j < together; ++j) {
            const int64_t index = (first_tile + i + j) * blocks + block;
            unpack_segment<Blocks>(static_cast<const uint8_t*>(args.packed) + index * Blocks::kBlockBytes,
                                   segment_blocks, chunks, bytes + j * chunks * kTileBytes);
          }
          const Segment segment{bytes, together, first_chunk, chunks, begin == 0};
          for (int64_t panel = panel_begin; panel < panel_end; panel += kTogether) {
            const int64_t panel_count = std::min(kTogether, panel_end - panel);
            if (is_last) prefetch_outputs(args, first_tile + i, panel, panel_count);
            multiply_segment(args, segment, panel, panel_count, acc + sums.at(i, panel));
          }
        }
      }
      if (args.groups == 1) break;
      for (int64_t i = 0; i < tiles; ++i) {
        const TileGroup weight(args, first_tile + i, group);
        for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
          const int64_t at = sums.at(i, panel);
          add(weight, group, panels.begin(panel), panels.size(panel), acc + at, sum + at);
        }
      }
    }
    // All tiles of a token in turn: y is written in whole lines of the cache.
    std::optional<TileGroup> weights[kManyTiles];
    std::optional<TileOutput> outputs[kManyTiles];
    for (int64_t i = 0; i < tiles; ++i) {
      weights[i].emplace(args, first_tile + i, 0);
      outputs[i].emplace(args, first_tile + i);
    }
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t begin = panels.begin(panel), size = panels.size(panel);
      for (int64_t t = 0; t < size; ++t) {
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t at = sums.at(i, panel) + t * kTileRows;
          if (args.groups == 1) {
            alignas(64) float row[kTileRows] = {};
            add(*weights[i], 0, begin + t, 1, acc + at, row);
            outputs[i]->store_token(begin + t, row);
          } else {
            outputs[i]->store_token(begin + t, sum + at);
          }
        }
      }
    }
  }
}

}  // namespace

extern const Gemm gemm_avx512amx{gemm_tiles<Int4Blocks>, kPanelTokens, kChunkFeatures};
extern const Gemm gemm_int8_avx512amx{gemm_tiles<Int8Blocks>, kPanelTokens, kChunkFeatures};

}  // namespace w4a4
