// SPDX-License-Identifier: Apache-2.0
// AIV: y[row, column] = s[row] * sum_g w_scale[g, column] * float(acc_g[row, column]) + bias[column], in float32 and in
// this order, rounded once to T. The two AIVs of a core take the upper and the lower rows of each of its tiles.
#pragma once

#include "common.h"

namespace w4a4::npu {

template <typename T, uint32_t kRows>
class EpilogueVector {
 public:
  static constexpr uint32_t kOwnRows = kRows / 2;
  static constexpr uint32_t kChunkRows = 16;
  static constexpr uint32_t kRowBlocks = kMaxTileColumns * sizeof(float) / kBlockBytes;
  static constexpr uint32_t kOutRowBlocks = kMaxTileColumns * sizeof(T) / kBlockBytes;
  // UB, in floats: results of the AIV's rows; chunks of sums; scales and bias of a tile; finished rows.
  static constexpr uint32_t kSumsAt = kOwnRows * kMaxTileColumns;
  static constexpr uint32_t kChunk = kChunkRows * kMaxTileColumns;
  static constexpr uint32_t kConstantsAt = kSumsAt + 2 * kChunk;
  static constexpr uint32_t kBiasAt = kMaxTileColumns;
  static constexpr uint32_t kTokenScalesAt = 2 * kMaxTileColumns;
  static constexpr uint32_t kConstants = 2 * kMaxTileColumns + kOwnRows * kScaleLanes;
  static constexpr uint32_t kOutAt = kConstantsAt + 2 * kConstants;
  static constexpr uint32_t kBytes = (kOutAt + kChunk) * sizeof(float);
  static_assert(kBytes <= kUbBytes);
  // Ids of its own among the events of each kind.
  static constexpr uint32_t kEvents = 4;

  // scale: float [tokens][kScaleLanes]; weight_scale: float [groups][out_features]; bias: float [out_features];
  // acc: the core's ring; y: T [tokens][out_features].
  __aicore__ inline EpilogueVector(TBuf<TPosition::VECCALC>& ub, const TilingData& tiling, uint32_t core,
                                   uint32_t cores, uint32_t half, GM_ADDR scale, GM_ADDR weight_scale, GM_ADDR bias,
                                   GM_ADDR acc, GM_ADDR y)
      : tiling_(tiling), core_(core), cores_(cores), grid_(tiling, Chunk(tiling, 0), core, cores), half_(half) {
    ub_ = ub.Get<float>();
    scale_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(scale));
    weight_scale_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(weight_scale));
    bias_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(bias));
    acc_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(acc));
    y_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(y));
  }

  // Call Start and Run, then Next and Run for each further chunk, then Finish.
  __aicore__ inline void Start() {
    for (uint32_t i = 0; i < 2; ++i) {
      AscendC::SetFlag<HardEvent::V_MTE2>(kConstantsEvent + i);
      AscendC::SetFlag<HardEvent::V_MTE2>(kSumsEvent + i);
      AscendC::SetFlag<HardEvent::MTE3_V>(i);
    }
  }

  __aicore__ inline void Next(uint32_t chunk) { grid_ = TileGrid(tiling_, Chunk(tiling_, chunk), core_, cores_); }
  __aicore__ inline uint32_t tiles() const { return grid_.count; }

  // `before(tile)` may do other work before each tile.
  template <typename Before>
  __aicore__ inline void Run(Before& before) {
    for (uint32_t i = 0; i < grid_.count; ++i) {
      before(i);
      const Tile tile(tiling_, grid_, i);
      const uint32_t upper = CeilDiv(tile.rows, 2);
      const uint32_t first = half_ == 0 ? 0 : upper;
      const uint32_t rows = half_ == 0 ? upper : tile.rows - upper;
      for (uint32_t group = 0; group < tiling_.groups; ++group) AddGroup(tile, first, rows, group);
    }
  }

  __aicore__ inline void Finish() {
    for (uint32_t i = 0; i < 2; ++i) {
      AscendC::WaitFlag<HardEvent::V_MTE2>(kConstantsEvent + i);
      AscendC::WaitFlag<HardEvent::V_MTE2>(kSumsEvent + i);
      AscendC::WaitFlag<HardEvent::MTE3_V>(i);
    }
  }

 private:
  static constexpr uint32_t kConstantsEvent = 0;
  static constexpr uint32_t kSumsEvent = 2;

  template <typename U>
  __aicore__ inline void Load(const LocalTensor<U>& to, const GlobalTensor<U>& from, uint32_t rows, uint32_t columns,
                              uint32_t from_stride, uint32_t to_stride) {
    AscendC::DataCopyExtParams copy;
    copy.blockCount = rows;
    copy.blockLen = columns * sizeof(U);
    copy.srcStride = (from_stride - columns) * sizeof(U);
    copy.dstStride = (to_stride - RoundUp(columns, kScaleLanes)) * sizeof(U) / kBlockBytes;
    copy.rsv = 0;
    AscendC::DataCopyPad(to, from, copy, AscendC::DataCopyPadExtParams<U>{false, 0, 0, 0});
  }

  __aicore__ inline void AddGroup(const Tile& tile, uint32_t first, uint32_t rows, uint32_t group) {
    const uint32_t ring = taken_ % kRingSlots;
    const bool is_last = group + 1 == tiling_.groups;
    AscendC::CrossCoreWaitFlag(kSumsReady);
    if (rows > 0) {
      LoadConstants(tile, first, rows, group, is_last);
      AscendC::WaitFlag<HardEvent::MTE2_V>(kConstantsEvent + ring);
      for (uint32_t row = 0; row < rows; row += kChunkRows) {
        AddChunk(tile, first, row, Min(kChunkRows, rows - row), group == 0, is_last);
      }
      AscendC::SetFlag<HardEvent::V_MTE2>(kConstantsEvent + ring);
    }
    AscendC::CrossCoreSetFlag<kModeGroup, PIPE_MTE2>(kSumsFree);
    ++taken_;
  }

  __aicore__ inline LocalTensor<float> Constants() const {
    return ub_[kConstantsAt + taken_ % kRingSlots * kConstants];
  }

  __aicore__ inline void LoadConstants(const Tile& tile, uint32_t first, uint32_t rows, uint32_t group, bool is_last) {
    const uint32_t ring = taken_ % kRingSlots;
    const LocalTensor<float> constants = Constants();
    AscendC::WaitFlag<HardEvent::V_MTE2>(kConstantsEvent + ring);
    Load(constants, weight_scale_[uint64_t{group} * tiling_.out_features + tile.column], 1, tile.columns, tile.columns,
         kMaxTileColumns);
    if (is_last) {
      if (tiling_.has_bias) {
        Load(constants[kBiasAt], bias_[tile.column], 1, tile.columns, tile.columns, kMaxTileColumns);
      }
      const uint32_t count = rows * kScaleLanes;
      Load(constants[kTokenScalesAt], scale_[uint64_t{tile.row + first} * kScaleLanes], 1, count, count, count);
    }
    AscendC::SetFlag<HardEvent::MTE2_V>(kConstantsEvent + ring);
  }

  // Rows [row, row + rows) of the AIV's part of the tile. An instruction computes 64 columns, one repeat per row.
  __aicore__ inline void AddChunk(const Tile& tile, uint32_t first, uint32_t row, uint32_t rows, bool is_first,
                                  bool is_last) {
    const uint32_t slot = chunks_ % 2;
    const LocalTensor<float> sums = ub_[kSumsAt + slot * kChunk];
    const LocalTensor<int32_t> integers = sums.template ReinterpretCast<int32_t>();
    const LocalTensor<float> result = ub_[row * kMaxTileColumns];
    const LocalTensor<float> constants = Constants();
    AscendC::WaitFlag<HardEvent::V_MTE2>(kSumsEvent + slot);
    const uint32_t ring_row = taken_ % kRingSlots * kRows + first + row;
    Load(integers, acc_[ring_row * kMaxTileColumns], rows, tile.columns, kMaxTileColumns, kMaxTileColumns);
    AscendC::SetFlag<HardEvent::MTE2_V>(kSumsEvent + slot);
    AscendC::WaitFlag<HardEvent::MTE2_V>(kSumsEvent + slot);

    const uint8_t stride = kRowBlocks;
    const uint8_t repeats = static_cast<uint8_t>(rows);
    const LocalTensor<float> scaled = is_first ? result : sums;
    for (uint32_t c = 0; c < tile.columns; c += kVectorLanes) {
      AscendC::Cast(scaled[c], integers[c], AscendC::RoundMode::CAST_NONE, Lanes(tile, c), repeats,
                    {1, 1, stride, stride});
    }
    AscendC::PipeBarrier<PIPE_V>();
    for (uint32_t c = 0; c < tile.columns; c += kVectorLanes) {
      AscendC::Mul(scaled[c], scaled[c], constants[c], Lanes(tile, c), repeats, {1, 1, 1, stride, stride, 0});
    }
    AscendC::PipeBarrier<PIPE_V>();
    if (!is_first) {
      for (uint32_t c = 0; c < tile.columns; c += kVectorLanes) {
        AscendC::Add(result[c], result[c], sums[c], Lanes(tile, c), repeats, {1, 1, 1, stride, stride, stride});
      }
      AscendC::PipeBarrier<PIPE_V>();
    }
    AscendC::SetFlag<HardEvent::V_MTE2>(kSumsEvent + slot);
    ++chunks_;
    if (is_last) Finish(tile, first, row, rows);
  }

  __aicore__ inline void Finish(const Tile& tile, uint32_t first, uint32_t row, uint32_t rows) {
    const uint32_t slot = finished_ % 2;
    const uint8_t stride = kRowBlocks;
    const uint8_t out_stride = kOutRowBlocks;
    const uint8_t repeats = static_cast<uint8_t>(rows);
    const LocalTensor<float> result = ub_[row * kMaxTileColumns];
    const LocalTensor<float> constants = Constants();
    const LocalTensor<float> token_scales = constants[kTokenScalesAt + row * kScaleLanes];
    const LocalTensor<T> out = ub_[kOutAt + slot * (kChunk / 2)].template ReinterpretCast<T>();
    for (uint32_t c = 0; c < tile.columns; c += kVectorLanes) {
      AscendC::Mul(result[c], result[c], token_scales, Lanes(tile, c), repeats, {1, 1, 0, stride, stride, 1});
    }
    AscendC::PipeBarrier<PIPE_V>();
    if (tiling_.has_bias) {
      for (uint32_t c = 0; c < tile.columns; c += kVectorLanes) {
        AscendC::Add(result[c], result[c], constants[kBiasAt + c], Lanes(tile, c), repeats,
                     {1, 1, 1, stride, stride, 0});
      }
      AscendC::PipeBarrier<PIPE_V>();
    }
    AscendC::WaitFlag<HardEvent::MTE3_V>(slot);
    for (uint32_t c = 0; c < tile.columns; c += kVectorLanes) {
      AscendC::Cast(out[c], result[c], AscendC::RoundMode::CAST_RINT, Lanes(tile, c), repeats,
                    {1, 1, out_stride, stride});
    }
    // The next tile's sums overwrite these results.
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::SetFlag<HardEvent::V_MTE3>(slot);
    AscendC::WaitFlag<HardEvent::V_MTE3>(slot);
    AscendC::DataCopyExtParams copy;
    copy.blockCount = rows;
    copy.blockLen = tile.columns * sizeof(T);
    copy.srcStride = kOutRowBlocks - CeilDiv(tile.columns * sizeof(T), kBlockBytes);
    copy.dstStride = (tiling_.out_features - tile.columns) * sizeof(T);
    copy.rsv = 0;
    AscendC::DataCopyPad(y_[uint64_t{tile.row + first + row} * tiling_.out_features + tile.column], out, copy);
    AscendC::SetFlag<HardEvent::MTE3_V>(slot);
    ++finished_;
  }

  __aicore__ inline uint64_t Lanes(const Tile& tile, uint32_t column) const {
    return Min(kVectorLanes, tile.columns - column);
  }

  const TilingData& tiling_;
  const uint32_t core_, cores_;
  TileGrid grid_;
  const uint32_t half_;
  LocalTensor<float> ub_;
  GlobalTensor<float> scale_, weight_scale_, bias_;
  GlobalTensor<int32_t> acc_;
  GlobalTensor<T> y_;
  uint32_t taken_ = 0;  // ring slots read
  uint32_t chunks_ = 0;
  uint32_t finished_ = 0;  // chunks written to y
};

}  // namespace w4a4::npu
