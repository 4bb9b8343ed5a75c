// SPDX-License-Identifier: Apache-2.0
// What the parts of the kernels share: on-chip memory, the flags between cores, small arithmetic.
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
inline constexpr uint32_t kVectorLanes = 64;  // float32 of one vector repeat, 256 bytes
inline constexpr uint32_t kVectorBlocks = 8;  // 32-byte blocks of one vector repeat
// An Mmad whose result has fewer fractals than this may overtake the one before it on the same result.
inline constexpr uint32_t kOrderedMmadFractals = 10;

// Events M_MTE1 of the two slots of L0A and L0B. TPipe uses 0 to 2 itself on an AIC.
inline constexpr uint32_t kL0FreeEvent = 3;

// Counters between cores. An AIC and its two AIVs (mode 2), except kGrid: all AIVs (mode 0).
inline constexpr uint16_t kTokensReady = 0;       // AIC -> AIV: transformed tokens lie in a ring slot
inline constexpr uint16_t kTokensFree = 1;        // AIV -> AIC: the slot may be overwritten
inline constexpr uint16_t kGrid = 2;              // every AIV has written its share of the int4 activations
inline constexpr uint16_t kActivationsReady = 3;  // AIV -> AIC: the int4 activations that this core reads are written
inline constexpr uint16_t kSumsReady = 4;         // AIC -> AIV: integer sums lie in a ring slot
inline constexpr uint16_t kSumsFree = 5;          // AIV -> AIC: the slot may be overwritten
inline constexpr uint8_t kModeAllVectors = 0;
inline constexpr uint8_t kModeGroup = 2;

__aicore__ inline uint32_t CeilDiv(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
__aicore__ inline uint32_t RoundUp(uint32_t a, uint32_t b) { return CeilDiv(a, b) * b; }
__aicore__ inline uint32_t Min(uint32_t a, uint32_t b) { return a < b ? a : b; }

template <bool kFirst, typename A, typename B>
struct Choose {
  using Type = A;
};
template <typename A, typename B>
struct Choose<false, A, B> {
  using Type = B;
};

template <typename T>
inline constexpr bool kIsHalf = false;
template <>
inline constexpr bool kIsHalf<half> = true;

// The AIC's memory, whole; each phase lays it out for itself.
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

// The tokens that one core transforms.
struct TokenRange {
  uint32_t begin;
  uint32_t end;
};

__aicore__ inline TokenRange TokensOf(const TilingData& tiling, uint32_t core, uint32_t cores) {
  if (tiling.replicated) return {0, tiling.tokens};
  return {static_cast<uint32_t>(uint64_t{core} * tiling.tokens / cores),
          static_cast<uint32_t>((uint64_t{core} + 1) * tiling.tokens / cores)};
}

// The output tiles of one core. Streaming: `core`, `core` + `cores`, ... in an order whose neighbours share a column of
// tiles, so that cores that run at the same time read the same weights. Resident: a run of neighbours in a row of
// tiles.
struct TileGrid {
  uint32_t first;
  uint32_t step;
  uint32_t count;

  __aicore__ inline TileGrid(const TilingData& tiling, uint32_t core, uint32_t cores) {
    const uint32_t tiles = tiling.row_tiles * tiling.column_tiles;
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
  uint32_t columns;          // real ones
  uint32_t column_fractals;  // the last one of a row of tiles may be partly padding

  __aicore__ inline Tile(const TilingData& tiling, const TileGrid& grid, uint32_t index) {
    const uint32_t tile = grid.first + index * grid.step;
    row = (tiling.resident ? tile / tiling.column_tiles : tile % tiling.row_tiles) * tiling.tile_rows;
    rows = Min(tiling.tile_rows, tiling.tokens - row);
    column = (tiling.resident ? tile % tiling.column_tiles : tile / tiling.row_tiles) * tiling.tile_columns;
    columns = Min(tiling.tile_columns, tiling.out_features - column);
    column_fractals = CeilDiv(columns, kFractalRows);
  }
};

}  // namespace w4a4::npu
