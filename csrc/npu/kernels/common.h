// SPDX-License-Identifier: Apache-2.0
// What all parts of the kernels share: on-chip memory, the flags between cores, small arithmetic.
#pragma once

#include "kernel_operator.h"
#include "tiling_data.h"

namespace w4a4::npu {

using AscendC::GlobalTensor;
using AscendC::HardEvent;
using AscendC::LocalTensor;
using AscendC::TBuf;
using AscendC::TPosition;

inline constexpr uint32_t kUbBytes = 192 * 1024;
inline constexpr uint32_t kL1Bytes = 512 * 1024;
inline constexpr uint32_t kL0Bytes = 64 * 1024;  // L0A and L0B each
inline constexpr uint32_t kL0CBytes = 128 * 1024;
inline constexpr uint32_t kFractalBytes = 512;
inline constexpr uint32_t kInt4Fractal = 1024;  // elements of a fractal
inline constexpr uint32_t kHalfFractal = 256;
inline constexpr uint32_t kMaxLoadRepeats = 255;  // of one LoadData
inline constexpr uint32_t kVectorLanes = 64;      // float32 of one vector repeat, 256 bytes
inline constexpr uint32_t kVectorBlocks = 8;      // 32-byte blocks of one vector repeat
// An Mmad whose result has fewer fractals than this may overtake the previous one on the same result.
inline constexpr uint32_t kOrderedMmadFractals = 10;

// The two slots of L0A and of L0B, in bytes. If GEMM and transform follow each other, both use all of L0A and L0B; if
// they alternate (several chunks), each has a half of its own, so that neither waits for the other.
struct L0Slots {
  uint32_t begin;
  uint32_t bytes;
  uint32_t load_event;  // MTE1_M
  uint32_t free_event;  // M_MTE1; on an AIC, TPipe uses 0 to 2 itself

  __aicore__ inline explicit L0Slots(const TilingData& tiling, bool is_transform)
      : begin(0), bytes(kL0Bytes / 2), load_event(0), free_event(3) {
    if (tiling.chunks == 1) return;
    bytes = kL0Bytes / 4;
    if (!is_transform) return;
    begin = kL0Bytes / 2;
    load_event += 2;
    free_event += 2;
  }
  __aicore__ inline void Open() const {
    for (uint32_t i = 0; i < 2; ++i) AscendC::SetFlag<HardEvent::M_MTE1>(free_event + i);
  }
  __aicore__ inline void Close() const {
    for (uint32_t i = 0; i < 2; ++i) AscendC::WaitFlag<HardEvent::M_MTE1>(free_event + i);
  }
};

// Counters between cores: between an AIC and its two AIVs (mode 2), except kGrid, which all AIVs share (mode 0).
inline constexpr uint16_t kTokensReady = 0;       // AIC -> AIV: transformed tokens are in a ring slot
inline constexpr uint16_t kTokensFree = 1;        // AIV -> AIC: the slot may be overwritten
inline constexpr uint16_t kGrid = 2;              // every AIV has written its share of the int4 activations
inline constexpr uint16_t kActivationsReady = 3;  // AIV -> AIC: the int4 activations that this core reads are written
inline constexpr uint16_t kSumsReady = 4;         // AIC -> AIV: integer sums are in a ring slot
inline constexpr uint16_t kSumsFree = 5;          // AIV -> AIC: the slot may be overwritten
inline constexpr uint8_t kModeAllVectors = 0;
inline constexpr uint8_t kModeGroup = 2;

__aicore__ inline uint32_t CeilDiv(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
__aicore__ inline uint32_t RoundUp(uint32_t a, uint32_t b) { return CeilDiv(a, b) * b; }
__aicore__ inline uint32_t Min(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Loads `outer` x `inner` fractals of `elements` from L1 to L0, with as few instructions as possible. Fractal (o, i)
// comes from `first` + o * `outer_stride` + i * `inner_stride`; in L0 they are contiguous, `inner` fastest.
template <typename T>
__aicore__ inline void LoadFractals(const LocalTensor<T>& to, const LocalTensor<T>& from, uint32_t elements,
                                    uint32_t first, uint32_t outer, uint32_t outer_stride, uint32_t inner,
                                    uint32_t inner_stride, bool transpose) {
  const bool is_run = outer_stride == inner * inner_stride && outer * inner <= kMaxLoadRepeats;
  const bool along_outer = !is_run && inner < outer;
  const uint32_t count = is_run ? 1 : along_outer ? inner : outer;
  AscendC::LoadData2DParams load;
  load.repeatTimes = is_run ? outer * inner : along_outer ? outer : inner;
  load.srcStride = along_outer ? outer_stride : inner_stride;
  load.dstGap = along_outer ? inner - 1 : 0;
  load.ifTranspose = transpose;
  for (uint32_t i = 0; i < count; ++i) {
    load.startIndex = first + i * (along_outer ? inner_stride : outer_stride);
    AscendC::LoadData(to[i * (along_outer ? 1 : inner) * elements], from, load);
  }
}

template <bool kFirst, typename A, typename B>
struct Conditional {
  using Type = A;
};
template <typename A, typename B>
struct Conditional<false, A, B> {
  using Type = B;
};

template <typename T>
inline constexpr bool kIsHalf = false;
template <>
inline constexpr bool kIsHalf<half> = true;

// All of the AIC's memory; each phase has its own layout.
struct CubeBuffers {
  TBuf<TPosition::A1> l1;
  TBuf<TPosition::A2> l0a;
  TBuf<TPosition::B2> l0b;
  TBuf<TPosition::CO1> l0c;

  __aicore__ inline void Init(AscendC::TPipe& pipe) {
    pipe.InitBuffer(l1, kL1Bytes);
    pipe.InitBuffer(l0a, kL0Bytes);
    pipe.InitBuffer(l0b, kL0Bytes);
    pipe.InitBuffer(l0c, kL0CBytes);
  }
};

// A chunk of tokens: whole rows of tiles. All its activations are quantized before its first tile is multiplied.
struct Chunk {
  uint32_t begin;  // tokens
  uint32_t end;
  uint32_t row_tiles;

  __aicore__ inline Chunk(const TilingData& tiling, uint32_t index) {
    begin = index == 0 ? 0 : tiling.first_chunk_tokens + (index - 1) * tiling.chunk_tokens;
    end = Min(begin + (index == 0 ? tiling.first_chunk_tokens : tiling.chunk_tokens), tiling.tokens);
    row_tiles = CeilDiv(end - begin, tiling.tile_rows);
  }
};

// The tokens of a chunk that one core transforms.
struct TokenRange {
  uint32_t begin;
  uint32_t end;
};

__aicore__ inline TokenRange TokensOf(const TilingData& tiling, const Chunk& chunk, uint32_t core, uint32_t cores) {
  if (tiling.replicated) return {chunk.begin, chunk.end};
  const uint64_t tokens = chunk.end - chunk.begin;
  return {chunk.begin + static_cast<uint32_t>(core * tokens / cores),
          chunk.begin + static_cast<uint32_t>((core + 1) * tokens / cores)};
}

// The output tiles of one core in a chunk. Streaming: `core`, `core` + `cores`, ... in an order whose neighbours share
// a column of tiles, so that cores that run at the same time read the same weights. Resident: a run of neighbours in a
// row of tiles.
struct TileGrid {
  Chunk chunk;
  uint32_t first;
  uint32_t step;
  uint32_t count;

  __aicore__ inline TileGrid(const TilingData& tiling, const Chunk& of, uint32_t core, uint32_t cores) : chunk(of) {
    const uint32_t tiles = chunk.row_tiles * tiling.column_tiles;
    if (tiling.resident) {
      first = static_cast<uint32_t>(uint64_t{core} * tiles / cores);
      step = 1;
      count = static_cast<uint32_t>((uint64_t{core} + 1) * tiles / cores) - first;
    } else {
      first = core;
      step = cores;
      count = core < tiles ? (tiles - core - 1) / cores + 1 : 0;
    }
  }
};

struct Tile {
  uint32_t row;
  uint32_t rows;
  uint32_t column;
  uint32_t columns;          // without padding
  uint32_t column_fractals;  // the last may be partly padding

  __aicore__ inline Tile(const TilingData& tiling, const TileGrid& grid, uint32_t index) {
    const uint32_t tile = grid.first + index * grid.step;
    const uint32_t row_tiles = grid.chunk.row_tiles;
    row = grid.chunk.begin + (tiling.resident ? tile / tiling.column_tiles : tile % row_tiles) * tiling.tile_rows;
    rows = Min(tiling.tile_rows, grid.chunk.end - row);
    column = (tiling.resident ? tile % tiling.column_tiles : tile / row_tiles) * tiling.tile_columns;
    columns = Min(tiling.tile_columns, tiling.out_features - column);
    column_fractals = CeilDiv(columns, kFractalRows);
  }
};

// The units that the transform of some tokens consists of, and how many ring slots are full after some of them.
struct TransformUnits {
  uint32_t count;
  uint32_t of_slot;

  __aicore__ inline TransformUnits(const TilingData& tiling, TokenRange tokens) {
    const uint32_t blocks = CeilDiv(tiling.right_padded, tiling.block_columns);
    count = CeilDiv(tokens.end - tokens.begin, tiling.pass_tokens) * blocks;
    of_slot = tiling.slot_tokens / tiling.pass_tokens * blocks;
  }
  __aicore__ inline uint32_t SlotsOf(uint32_t done) const {
    return done == count ? CeilDiv(count, of_slot) : done / of_slot;
  }
};

// How many of the next chunk's `units` of transform are due after a number of L0 slots of this chunk's `tiles`. They
// are spread evenly over all tiles except the last two, during which the last tokens are quantized and the cores
// synchronize, and within a tile over the slots after the previous tile's sums have left L0C, since the transform's
// sums use the same path.
class Pace {
 public:
  __aicore__ inline Pace(const TilingData& tiling, uint32_t units, uint32_t tiles)
      : units_(units), tile_slots_(CeilDiv(tiling.in_features, kPipelinedDepth)), late_slots_(tile_slots_) {
    if (kStoreDepth / kPipelinedDepth < tile_slots_) late_slots_ -= kStoreDepth / kPipelinedDepth;
    all_slots_ = (tiles > 3 ? tiles - 2 : tiles) * late_slots_;
  }
  __aicore__ inline uint32_t After(uint32_t slots) const {
    const uint32_t early = tile_slots_ - late_slots_, in_tile = slots % tile_slots_;
    const uint32_t done = slots / tile_slots_ * late_slots_ + (in_tile > early ? in_tile - early : 0);
    return done < all_slots_ ? static_cast<uint32_t>(uint64_t{units_} * done / all_slots_) : units_;
  }
  // When the AIC stores the tile's sums.
  __aicore__ inline uint32_t AtEnd(uint32_t tile) const { return After((tile + 1) * tile_slots_ - 1); }

 private:
  // Depth that is multiplied while a tile's sums leave L0C, for tiles of any size: 16384 int4 products per cycle
  // against 70 GiB/s.
  static constexpr uint32_t kStoreDepth = 1536;

  uint32_t units_, tile_slots_, late_slots_, all_slots_;
};

}  // namespace w4a4::npu
