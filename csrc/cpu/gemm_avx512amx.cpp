// SPDX-License-Identifier: Apache-2.0
// tdpbsud on tiles: 16 tokens x 64 features times 64 features x 16 rows in one instruction. Eight unpacked blocks of a
// weight tile are a tile operand as they are, and so is a panel's unit of activations.
#define W4A4_VECTOR_FLOATS 16
#include <immintrin.h>

#include "gemm_impl.h"
#include "unpack_avx512.h"

namespace w4a4 {
namespace {

constexpr int64_t kChunkFeatures = kTokenAlignment;
constexpr int64_t kChunkBlocks = kChunkFeatures / kBlockFeatures;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileSums = 256;
constexpr int64_t kPanelTokens = 16;
constexpr int64_t kMaxPanels = kMaxGemmTokens / kPanelTokens;
// Chunks of two weight tiles that are unpacked at once: 32 KB, which stay in the first-level cache while the
// activations stream past them.
constexpr int64_t kSegmentChunks = 16;
// Two by two tiles of sums need as many loads as products; with one by two the loads would be the limit.
constexpr int64_t kTogether = 2;
// The tile registers of this thread, all of 16 rows x 64 bytes, while it lives. Whoever uses tiles configures them
// anew, so nothing is restored.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64);
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

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
  unpack_avx512<Blocks>(packed, blocks, bytes);
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

template <class Blocks>
void gemm_tiles(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, int64_t panel_begin, int64_t panel_end) {
  const Panels& panels = args.panels;
  const int64_t blocks = block_count(args.in_features);
  // Groups are whole chunks, unless there is but one; see Gemm::choose.
  const int64_t group_blocks = ceil_div(blocks, args.groups), group_chunks = ceil_div(group_blocks, kChunkBlocks);
  alignas(64) uint8_t bytes[kTogether * kSegmentChunks * kTileBytes];
  alignas(64) int32_t acc[kMaxPanels * kTogether * kTileSums];
  alignas(64) float sum[kMaxPanels * kTogether * kTileSums];
  const Tiles configured;

  for (int64_t tile = tile_begin; tile < tile_end; tile += kTogether) {
    const int64_t tiles = std::min(kTogether, tile_end - tile);
    // body(panel, i, index of their sums) for all panels and the weight tiles tile + i.
    const auto for_sums = [&](const auto& body) {
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        for (int64_t i = 0; i < tiles; ++i) body(panel, i, ((panel - panel_begin) * kTogether + i) * kTileSums);
      }
    };
    std::memset(sum, 0, (panel_end - panel_begin) * kTogether * kTileSums * sizeof(float));
    for (int64_t group = 0; group < args.groups; ++group) {
      for (int64_t begin = 0; begin < group_chunks; begin += kSegmentChunks) {
        const int64_t chunks = std::min(kSegmentChunks, group_chunks - begin);
        const int64_t first_chunk = group * group_chunks + begin;
        const int64_t block = first_chunk * kChunkBlocks, count = std::min(chunks * kChunkBlocks, blocks - block);
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t index = (tile + i) * blocks + block;
          unpack_segment<Blocks>(static_cast<const uint8_t*>(args.packed) + index * Blocks::kBlockBytes, count, chunks,
                                 bytes + i * chunks * kTileBytes);
        }
        const Segment segment{bytes, tiles, first_chunk, chunks, begin == 0};
        for (int64_t panel = panel_begin; panel < panel_end; panel += kTogether) {
          multiply_segment(args, segment, panel, std::min(kTogether, panel_end - panel),
                           acc + (panel - panel_begin) * kTogether * kTileSums);
        }
      }
      const TileGroup weights[kTogether] = {{args, tile, group}, {args, tile + tiles - 1, group}};
      for_sums([&](int64_t panel, int64_t i, int64_t index) {
        add_group(args, weights[i], args.zero_point + Blocks::kAdded, group, panels.begin(panel), panels.size(panel),
                  acc + index, sum + index);
      });
    }
    // All tiles of a token in turn: together they fill whole lines of the cache.
    const TileOutput outputs[kTogether] = {{args, tile}, {args, tile + tiles - 1}};
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const float* sums = sum + (panel - panel_begin) * kTogether * kTileSums;
      for (int64_t token = 0; token < panels.size(panel); ++token) {
        for (int64_t i = 0; i < tiles; ++i) {
          outputs[i].store_token(panels.begin(panel) + token, sums + i * kTileSums + token * kTileRows);
        }
      }
    }
  }
}

}  // namespace

extern const Gemm gemm_avx512amx{gemm_tiles<Int4Blocks>, kPanelTokens, kChunkFeatures};
extern const Gemm gemm_int8_avx512amx{gemm_tiles<Int8Blocks>, kPanelTokens, kChunkFeatures};

}  // namespace w4a4
