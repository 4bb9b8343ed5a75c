// SPDX-License-Identifier: Apache-2.0
// AIC: integer sums acc[row, column] = sum_k q[row, k] * w[column, k] of the core's tiles, one sum per scale group.
//
//   GM --MTE2--> L1 (256 to 1024 inputs) --MTE1--> L0A, L0B (two slots) --M--> L0C (two slots) --FIX--> workspace
//
// A tile's columns are computed in units of at most kUnitColumns, each in an L0C slot of its own, so that one unit's
// sums are stored while the next unit is multiplied.
#pragma once

#include "common.h"

namespace w4a4::npu {

// Activations and weights of a step share a stage, or (`resident`) the activations of a row of tiles stay in L1, in one
// slot per step, and only weights have stages: then GM->L1 carries only weights, each once per row of tiles.
template <uint32_t kRows>
class GemmCube {
 public:
  static constexpr uint32_t kStreamingStages = kRows == 128 ? 2 : 3;
  static constexpr uint32_t kMaxStages = 3;
  static constexpr uint32_t kUnitColumns = kRows == 128 ? 128 : 256;
  static constexpr uint32_t kDepth = kRows == 128 ? 512 : 256;  // inputs of one L0 slot
  static_assert(kRows * kPipelinedDepth / 2 <= kL0Bytes / 4);
  static_assert(kStreamingStages * (kRows + kMaxTileColumns) * kGemmStepK / 2 <= kL1Bytes);
  static_assert(kRows * kDepth / 2 <= kL0Bytes / 2 && kUnitColumns * kDepth / 2 <= kL0Bytes / 2);
  static constexpr uint32_t kL0CSlot = kL0CBytes / 2 / sizeof(int32_t);  // sums
  static_assert(kRows * kUnitColumns <= kL0CSlot);
  static_assert(2 * (kPipelinedTileSums + kPipelinedTransformSums) * sizeof(int32_t) <= kL0CBytes);

  // q: int4 [tokens][q_row_bytes]; weight: int4 nZ; acc: the core's ring, int32 [kRingSlots][kRows][kMaxTileColumns].
  __aicore__ inline GemmCube(CubeBuffers& buffers, const TilingData& tiling, uint32_t core, uint32_t cores, GM_ADDR q,
                             GM_ADDR weight, GM_ADDR acc)
      : tiling_(tiling), core_(core), cores_(cores), grid_(tiling, Chunk(tiling, 0), core, cores), l0_(tiling, false) {
    l1_ = buffers.l1.Get<int8_t>();
    l1_int4_ = buffers.l1.Get<AscendC::int4b_t>();
    l0a_ = buffers.l0a.Get<AscendC::int4b_t>();
    l0b_ = buffers.l0b.Get<AscendC::int4b_t>();
    l0c_ = buffers.l0c.Get<int32_t>();
    q_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(q));
    weight_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(weight));
    acc_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(acc));
    depth_steps_ = CeilDiv(tiling.in_features, tiling.step_depth);
    weight_fractals_ = CeilDiv(tiling.out_features, kFractalRows);
    steps_ = grid_.count * depth_steps_;
    activation_bytes_ = tiling.tile_rows * tiling.step_depth / 2;
    weight_bytes_ = tiling.tile_columns * tiling.step_depth / 2;
    const bool is_pipelined = tiling.chunks > 1;
    l0c_slot_ = is_pipelined ? kPipelinedTileSums : kL0CSlot;
    depth_ = is_pipelined ? kPipelinedDepth : kDepth;
    stages_ = kStreamingStages;
    if (tiling.resident) {
      const uint32_t room = (kL1Bytes - depth_steps_ * activation_bytes_) / weight_bytes_;
      stages_ = Min(Min(is_pipelined ? kPipelinedStages : kMaxStages, depth_steps_), room);
    }
    UseStages(stages_);
  }

  // Call before Start, with at most stages(). Two stages keep the loads going; a third only holds more weights by the
  // time they are needed.
  __aicore__ inline void UseStages(uint32_t stages) {
    stages_ = stages;
    weights_at_ = (tiling_.resident ? depth_steps_ : stages_) * activation_bytes_;
  }

  // Bytes that the GEMM uses at the beginning of L1, with `stages` of weights.
  __aicore__ inline uint32_t L1Bytes(uint32_t stages) const {
    return (tiling_.resident ? depth_steps_ : stages) * activation_bytes_ + stages * weight_bytes_;
  }
  __aicore__ inline uint32_t stages() const { return stages_; }

  // Call Start and Run, then Next and Run for each further chunk, then Finish. Start must follow every other use of the
  // GEMM's part of L1. It loads the first stages of weights, which do not depend on the activations.
  __aicore__ inline void Start() {
    ClearRowPadding();
    for (uint32_t i = 0; i < stages_; ++i) AscendC::SetFlag<HardEvent::MTE1_MTE2>(i);
    for (uint32_t i = 0; i < 2; ++i) AscendC::SetFlag<HardEvent::FIX_M>(i);
    for (uint32_t i = 0; i < Min(steps_, stages_); ++i) LoadWeights(i);
  }

  __aicore__ inline void Next(uint32_t chunk) {
    grid_ = TileGrid(tiling_, Chunk(tiling_, chunk), core_, cores_);
    steps_ = grid_.count * depth_steps_;
    for (uint32_t i = 0; i < Min(steps_, stages_); ++i) LoadWeights(i);
  }

  __aicore__ inline uint32_t tiles() const { return grid_.count; }

  // `wait`: the activations are being written by this launch. `between(n)` may issue other work after the n-th L0 slot.
  template <typename Between>
  __aicore__ inline void Run(bool wait, const Between& between) {
    if (wait) AscendC::CrossCoreWaitFlag(kActivationsReady);
    for (uint32_t i = 0; i < Min(steps_, stages_); ++i) LoadActivations(i);
    uint32_t slots = 0;
    for (uint32_t i = 0; i < steps_; ++i) {
      Multiply(i, slots, between);
      if (i + stages_ < steps_) {
        LoadWeights(i + stages_);
        LoadActivations(i + stages_);
      }
    }
  }

  __aicore__ inline void Finish() {
    for (uint32_t i = 0; i < stages_; ++i) AscendC::WaitFlag<HardEvent::MTE1_MTE2>(i);
    for (uint32_t i = 0; i < 2; ++i) AscendC::WaitFlag<HardEvent::FIX_M>(i);
    for (uint32_t i = 0; i < Min(stored_, kRingSlots); ++i) AscendC::CrossCoreWaitFlag(kSumsFree);
  }

 private:
  // A tile of one row is multiplied as 16, since Mmad expects another layout of A for m == 1; the 15 other rows are
  // zeros that no later copy overwrites.
  __aicore__ inline void ClearRowPadding() {
    if (tiling_.tokens - (tiling_.row_tiles - 1) * tiling_.tile_rows != 1) return;
    // The transform has read everything that it has in L1 by then.
    AscendC::SetFlag<HardEvent::MTE1_MTE2>(0);
    AscendC::WaitFlag<HardEvent::MTE1_MTE2>(0);
    const LocalTensor<int32_t> activations = l1_.template ReinterpretCast<int32_t>();
    AscendC::InitConstValueParams<int32_t> zeros;
    zeros.repeatTimes = 1;
    zeros.blockNum = weights_at_ / kBlockBytes;
    zeros.dstGap = 0;
    zeros.initValue = 0;
    AscendC::InitConstValue(activations, zeros);
    AscendC::PipeBarrier<PIPE_MTE2>();
  }

  // A step is one stage's worth of inputs of one tile.
  __aicore__ inline uint32_t DepthBegin(uint32_t step) const { return step % depth_steps_ * tiling_.step_depth; }
  __aicore__ inline uint32_t DepthOf(uint32_t step) const {
    return Min(tiling_.step_depth, tiling_.in_features - DepthBegin(step));
  }

  __aicore__ inline void LoadWeights(uint32_t step) {
    const Tile tile(tiling_, grid_, step / depth_steps_);
    const uint32_t stage = step % stages_;
    const uint32_t fractal_rows = CeilDiv(DepthOf(step), kInt4FractalK);
    const uint32_t first = DepthBegin(step) / kInt4FractalK * weight_fractals_ + tile.column / kFractalRows;
    AscendC::WaitFlag<HardEvent::MTE1_MTE2>(stage);
    AscendC::DataCopyParams copy;
    copy.blockCount = fractal_rows;
    copy.blockLen = tile.column_fractals * (kFractalBytes / kBlockBytes);
    copy.srcStride = (weight_fractals_ - tile.column_fractals) * (kFractalBytes / kBlockBytes);
    copy.dstStride = 0;
    AscendC::DataCopy(l1_[weights_at_ + stage * weight_bytes_], weight_[uint64_t{first} * kFractalBytes], copy);
  }

  // Where the activations of a step are in L1. A resident slot is free when the step's stage is: there are at most as
  // many stages as slots, so the step that last read the slot is not later than the one that last used the stage.
  __aicore__ inline uint32_t ActivationsAt(uint32_t step) const {
    return (tiling_.resident ? step % depth_steps_ : step % stages_) * activation_bytes_;
  }

  __aicore__ inline void LoadActivations(uint32_t step) {
    const uint32_t index = step / depth_steps_;
    const Tile tile(tiling_, grid_, index);
    const bool is_there = tiling_.resident && index > 0 && Tile(tiling_, grid_, index - 1).row == tile.row;
    if (!is_there) {
      AscendC::Nd2NzParams copy;
      copy.ndNum = 1;
      copy.nValue = tile.rows;
      copy.dValue = DepthOf(step) / 2;
      copy.srcNdMatrixStride = 0;
      copy.srcDValue = tiling_.q_row_bytes;
      copy.dstNzC0Stride = tiling_.tile_rows;
      copy.dstNzNStride = 1;
      copy.dstNzMatrixStride = 0;
      AscendC::DataCopy(l1_[ActivationsAt(step)], q_[uint64_t{tile.row} * tiling_.q_row_bytes + DepthBegin(step) / 2],
                        copy);
    }
    AscendC::SetFlag<HardEvent::MTE2_MTE1>(step % stages_);
  }

  template <typename Between>
  __aicore__ inline void Multiply(uint32_t step, uint32_t& slots, const Between& between) {
    const Tile tile(tiling_, grid_, step / depth_steps_);
    const uint32_t stage = step % stages_;
    const uint32_t begin = DepthBegin(step), end = begin + DepthOf(step);
    const uint32_t units = CeilDiv(tile.columns, kUnitColumns);
    AscendC::WaitFlag<HardEvent::MTE2_MTE1>(stage);
    // A part is the portion of this stage that lies in one scale group.
    for (uint32_t part = begin; part < end;) {
      const uint32_t group_end = (part / tiling_.group_size + 1) * tiling_.group_size;
      const uint32_t part_end = Min(end, group_end);
      const bool starts = part % tiling_.group_size == 0, ends = part_end == group_end;
      for (uint32_t unit = 0; unit < units; ++unit) {
        const uint32_t slot = (units_done_ + unit) % 2;
        const uint32_t first_fractal = unit * (kUnitColumns / kFractalRows);
        const uint32_t fractals = Min(kUnitColumns / kFractalRows, tile.column_fractals - first_fractal);
        if (starts) AscendC::WaitFlag<HardEvent::FIX_M>(slot);
        for (uint32_t k = part; k < part_end; k += depth_) {
          const uint32_t depth = Min(depth_, part_end - k);
          MultiplyPart(tile, step, (k - begin) / kInt4FractalK, depth, first_fractal, fractals, slot,
                       starts && k == part);
          if (ends && k + depth == part_end) {
            Store(tile, first_fractal, fractals, slot, unit == 0, unit + 1 == units);
          }
          between(++slots);
        }
      }
      if (ends) units_done_ += units;
      part = part_end;
    }
    AscendC::SetFlag<HardEvent::MTE1_MTE2>(stage);
  }

  // One L0 slot: the rows of `tile` times `fractals` * 16 columns over a depth of `depth`.
  __aicore__ inline void MultiplyPart(const Tile& tile, uint32_t step, uint32_t first_depth, uint32_t depth,
                                      uint32_t first_fractal, uint32_t fractals, uint32_t slot, bool is_first) {
    const uint32_t depth_fractals = CeilDiv(depth, kInt4FractalK);
    const uint32_t row_fractals = CeilDiv(tile.rows, kFractalRows);
    const uint32_t l1_rows = tiling_.tile_rows / kFractalRows;
    const uint32_t at = l0_.begin + l0_slot_ * l0_.bytes;
    const LocalTensor<AscendC::int4b_t> l0a = l0a_[at * 2];  // two elements per byte
    const LocalTensor<AscendC::int4b_t> l0b = l0b_[at * 2];
    AscendC::WaitFlag<HardEvent::M_MTE1>(l0_.free_event + l0_slot_);
    LoadFractals(l0a, l1_int4_[ActivationsAt(step) * 2], kInt4Fractal, first_depth * l1_rows, row_fractals, 1,
                 depth_fractals, l1_rows, false);
    LoadFractals(l0b, l1_int4_[(weights_at_ + step % stages_ * weight_bytes_) * 2], kInt4Fractal,
                 first_depth * tile.column_fractals + first_fractal, depth_fractals, tile.column_fractals, fractals, 1,
                 false);
    AscendC::SetFlag<HardEvent::MTE1_M>(l0_.load_event + l0_slot_);
    AscendC::WaitFlag<HardEvent::MTE1_M>(l0_.load_event + l0_slot_);
    if (!is_first && row_fractals * fractals < kOrderedMmadFractals) AscendC::PipeBarrier<PIPE_M>();
    AscendC::MmadParams multiply;
    multiply.m = tile.rows == 1 ? kFractalRows : tile.rows;
    multiply.n = fractals * kFractalRows;
    multiply.k = depth;
    multiply.cmatrixInitVal = is_first;
    AscendC::Mmad(l0c_[slot * l0c_slot_], l0a, l0b, multiply);
    AscendC::SetFlag<HardEvent::M_MTE1>(l0_.free_event + l0_slot_);
    l0_slot_ ^= 1;
  }

  // Stores a unit's sums in the ring slot of its tile and group.
  __aicore__ inline void Store(const Tile& tile, uint32_t first_fractal, uint32_t fractals, uint32_t slot,
                               bool is_first, bool is_last) {
    if (is_first && stored_ >= kRingSlots) AscendC::CrossCoreWaitFlag(kSumsFree);
    AscendC::SetFlag<HardEvent::M_FIX>(slot);
    AscendC::WaitFlag<HardEvent::M_FIX>(slot);
    AscendC::FixpipeParamsV220 store;
    store.nSize = fractals * kFractalRows;
    store.mSize = tile.rows;
    store.srcStride = RoundUp(tile.rows, kFractalRows);
    store.dstStride = kMaxTileColumns;
    store.ndNum = 1;
    store.quantPre = QuantMode_t::NoQuant;
    const uint32_t ring = stored_ % kRingSlots * kRows * kMaxTileColumns;
    AscendC::Fixpipe<int32_t, int32_t, AscendC::CFG_ROW_MAJOR>(acc_[ring + first_fractal * kFractalRows],
                                                               l0c_[slot * l0c_slot_], store);
    AscendC::SetFlag<HardEvent::FIX_M>(slot);
    if (!is_last) return;
    AscendC::CrossCoreSetFlag<kModeGroup, PIPE_FIX>(kSumsReady);
    ++stored_;
  }

  const TilingData& tiling_;
  const uint32_t core_, cores_;
  TileGrid grid_;
  const L0Slots l0_;
  LocalTensor<int8_t> l1_;
  LocalTensor<AscendC::int4b_t> l1_int4_, l0a_, l0b_;
  LocalTensor<int32_t> l0c_;
  GlobalTensor<int8_t> q_, weight_;
  GlobalTensor<int32_t> acc_;
  uint32_t depth_steps_, weight_fractals_, steps_;
  uint32_t activation_bytes_, weight_bytes_;  // of a stage or slot
  uint32_t stages_;
  uint32_t weights_at_;
  uint32_t depth_;     // inputs of an L0 slot
  uint32_t l0c_slot_;  // sums
  uint32_t l0_slot_ = 0;
  uint32_t units_done_ = 0;  // units whose sums are stored
  uint32_t stored_ = 0;      // ring slots filled
};

}  // namespace w4a4::npu
