// SPDX-License-Identifier: Apache-2.0
// AIC: z = L^T (X R) of each of the core's tokens, X being the token as a matrix [left, right].
//
// One pass takes the rows of `pass_tokens` tokens as one operand: y = X R for `block_columns` columns into L0C, rounded
// to T on its way back to L1, then L^T y per token, float32 into the ring in workspace. A missing factor drops its
// half. All operands of T are loaded as stored; the fractals that the cube wants the other way round (R, y, L^T) are
// transposed on their way to L0.
#pragma once

#include "common.h"

namespace w4a4::npu {

template <typename T, Factors kFactors>
class TransformCube {
 public:
  static constexpr bool kLeft = kFactors == Factors::kLeft || kFactors == Factors::kBoth;
  static constexpr bool kRight = kFactors == Factors::kRight || kFactors == Factors::kBoth;

  // x: T [tokens][in_features]; left: T [left][left];
  // right: T [right][right]; z: the core's ring, float [kRingSlots][slot_tokens][left][right_padded].
  __aicore__ inline TransformCube(CubeBuffers& buffers, const TilingData& tiling, TokenRange tokens, GM_ADDR x,
                                  GM_ADDR left, GM_ADDR right, GM_ADDR z)
      : tiling_(tiling), tokens_(tokens) {
    pass_rows_ = tiling.pass_tokens * tiling.left_padded;
    const uint32_t left_at = (kRight ? tiling.right_padded * tiling.right_padded : 0);
    const uint32_t product_at = left_at + (kLeft ? tiling.left_padded * tiling.left_padded : 0);
    const uint32_t tokens_at = product_at + pass_rows_ * tiling.block_columns;
    const LocalTensor<T> l1 = buffers.l1.Get<T>();
    right_l1_ = l1;
    left_l1_ = l1[left_at];
    product_l1_ = l1[product_at];
    tokens_l1_ = l1[tokens_at];
    l0a_ = buffers.l0a.Get<T>();
    l0b_ = buffers.l0b.Get<T>();
    l0c_ = buffers.l0c.Get<float>();
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x));
    left_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(left));
    right_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(right));
    z_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(z));
  }

  __aicore__ inline void Run() {
    const uint32_t passes = CeilDiv(tokens_.end - tokens_.begin, tiling_.pass_tokens);
    if (passes == 0) return;
    for (uint32_t i = 0; i < 2; ++i) {
      AscendC::SetFlag<HardEvent::MTE1_MTE2>(i);
      AscendC::SetFlag<HardEvent::M_MTE1>(kL0FreeEvent + i);
      AscendC::SetFlag<HardEvent::FIX_M>(i);
    }
    LoadFactors();
    LoadTokens(0);
    AscendC::WaitFlag<HardEvent::MTE2_MTE1>(kFactorsEvent);
    const uint32_t slot_passes = tiling_.slot_tokens / tiling_.pass_tokens;
    for (uint32_t pass = 0; pass < passes; ++pass) {
      if (pass + 1 < passes) LoadTokens(pass + 1);
      const bool opens = pass % slot_passes == 0;
      const bool closes = pass % slot_passes + 1 == slot_passes || pass + 1 == passes;
      if (opens && filled_ >= kRingSlots) AscendC::CrossCoreWaitFlag(kTokensFree);
      Transform(pass);
      if (!closes) continue;
      AscendC::CrossCoreSetFlag<kModeGroup, PIPE_FIX>(kTokensReady);
      ++filled_;
    }
    for (uint32_t i = 0; i < 2; ++i) {
      AscendC::WaitFlag<HardEvent::MTE1_MTE2>(i);
      AscendC::WaitFlag<HardEvent::M_MTE1>(kL0FreeEvent + i);
      AscendC::WaitFlag<HardEvent::FIX_M>(i);
    }
    for (uint32_t i = 0; i < Min(filled_, kRingSlots); ++i) AscendC::CrossCoreWaitFlag(kTokensFree);
  }

 private:
  static constexpr uint32_t kFactorsEvent = 2;
  static constexpr uint32_t kL0Slot = kL0Bytes / 2 / sizeof(T);
  static constexpr uint32_t kL0CSlot = kL0CBytes / 2 / sizeof(float);
  static constexpr uint32_t kProduct = 0;  // L0C slots
  static constexpr uint32_t kResult = 1;

  __aicore__ inline void LoadMatrix(const LocalTensor<T>& to, const GlobalTensor<T>& from, uint32_t size) {
    AscendC::Nd2NzParams copy;
    copy.ndNum = 1;
    copy.nValue = size;
    copy.dValue = size;
    copy.srcNdMatrixStride = 0;
    copy.srcDValue = size;
    copy.dstNzC0Stride = RoundUp(size, kFractalRows);
    copy.dstNzNStride = 1;
    copy.dstNzMatrixStride = 0;
    AscendC::DataCopy(to, from, copy);
  }

  __aicore__ inline void LoadFactors() {
    if constexpr (kRight) LoadMatrix(right_l1_, right_, tiling_.right);
    if constexpr (kLeft) LoadMatrix(left_l1_, left_, tiling_.left);
    AscendC::SetFlag<HardEvent::MTE2_MTE1>(kFactorsEvent);
  }

  __aicore__ inline uint32_t TokensOfPass(uint32_t pass) const {
    return Min(tiling_.pass_tokens, tokens_.end - tokens_.begin - pass * tiling_.pass_tokens);
  }

  // L1 holds NZ: [column / 16][pass_rows_][16].
  __aicore__ inline void LoadTokens(uint32_t pass) {
    const uint32_t slot = pass % 2;
    AscendC::WaitFlag<HardEvent::MTE1_MTE2>(slot);
    AscendC::Nd2NzParams copy;
    copy.ndNum = 1;
    copy.nValue = TokensOfPass(pass) * tiling_.left;  // several tokens only if `left` needs no padding
    copy.dValue = tiling_.right;
    copy.srcNdMatrixStride = 0;
    copy.srcDValue = tiling_.right;
    copy.dstNzC0Stride = pass_rows_;
    copy.dstNzNStride = 1;
    copy.dstNzMatrixStride = 0;
    const uint64_t token = tokens_.begin + pass * tiling_.pass_tokens;
    AscendC::DataCopy(TokensL1(slot), x_[token * tiling_.in_features], copy);
    AscendC::SetFlag<HardEvent::MTE2_MTE1>(slot);
  }

  __aicore__ inline LocalTensor<T> TokensL1(uint32_t slot) const {
    return tokens_l1_[slot * pass_rows_ * tiling_.right_padded];
  }

  // An operand in L1: fractals of 16 x 16, NZ, `stride` fractals from a column of fractals to the next.
  struct Operand {
    LocalTensor<T> tensor;
    uint32_t first;
    uint32_t stride;
  };

  // c = a b over `depth` inputs for `rows` x 16 * `column_fractals`. kTransposeA: `a` is stored as [depth, rows].
  template <bool kTransposeA>
  __aicore__ inline void Multiply(const LocalTensor<float>& c, const Operand& a, const Operand& b, uint32_t rows,
                                  uint32_t column_fractals, uint32_t depth) {
    const uint32_t row_fractals = CeilDiv(rows, kFractalRows);
    const uint32_t widest = row_fractals > column_fractals ? row_fractals : column_fractals;
    const uint32_t most = kL0Slot / kHalfFractal / widest;
    const uint32_t depth_fractals = CeilDiv(depth, kFractalRows);
    for (uint32_t first = 0; first < depth_fractals; first += most) {
      const uint32_t fractals = Min(most, depth_fractals - first);
      const LocalTensor<T> l0a = l0a_[l0_slot_ * kL0Slot];
      const LocalTensor<T> l0b = l0b_[l0_slot_ * kL0Slot];
      AscendC::WaitFlag<HardEvent::M_MTE1>(kL0FreeEvent + l0_slot_);
      for (uint32_t m = 0; m < row_fractals; ++m) {
        AscendC::LoadData2DParams load;
        load.startIndex = a.first + (kTransposeA ? m * a.stride + first : first * a.stride + m);
        load.repeatTimes = fractals;
        load.srcStride = kTransposeA ? 1 : a.stride;
        load.ifTranspose = kTransposeA;
        AscendC::LoadData(l0a[m * fractals * kHalfFractal], a.tensor, load);
      }
      for (uint32_t k = 0; k < fractals; ++k) {
        AscendC::LoadData2DParams load;
        load.startIndex = b.first + first + k;
        load.repeatTimes = column_fractals;
        load.srcStride = b.stride;
        load.ifTranspose = true;
        AscendC::LoadData(l0b[k * column_fractals * kHalfFractal], b.tensor, load);
      }
      AscendC::SetFlag<HardEvent::MTE1_M>(l0_slot_);
      AscendC::WaitFlag<HardEvent::MTE1_M>(l0_slot_);
      if (first > 0 && row_fractals * column_fractals < kOrderedMmadFractals) AscendC::PipeBarrier<PIPE_M>();
      AscendC::MmadParams multiply;
      multiply.m = rows;
      multiply.n = column_fractals * kFractalRows;
      multiply.k = Min(fractals * kFractalRows, depth - first * kFractalRows);
      multiply.cmatrixInitVal = first == 0;
      AscendC::Mmad(c, l0a, l0b, multiply);
      AscendC::SetFlag<HardEvent::M_MTE1>(kL0FreeEvent + l0_slot_);
      l0_slot_ ^= 1;
    }
  }

  __aicore__ inline void Transform(uint32_t pass) {
    const uint32_t slot = pass % 2;
    const uint32_t count = TokensOfPass(pass);
    const uint32_t rows = count * tiling_.left;
    const uint32_t row_fractals = pass_rows_ / kFractalRows;
    const LocalTensor<float> product = l0c_[kProduct * kL0CSlot];
    const LocalTensor<float> result = l0c_[kResult * kL0CSlot];
    AscendC::WaitFlag<HardEvent::MTE2_MTE1>(slot);
    for (uint32_t column = 0; column < tiling_.right_padded; column += tiling_.block_columns) {
      const uint32_t fractals = Min(tiling_.block_columns, tiling_.right_padded - column) / kFractalRows;
      const uint32_t first = column / kFractalRows;
      Operand y{TokensL1(slot), first * row_fractals, row_fractals};
      if constexpr (kRight) {
        const uint32_t right_fractals = tiling_.right_padded / kFractalRows;
        AscendC::WaitFlag<HardEvent::FIX_M>(kProduct);
        Multiply<false>(product, {TokensL1(slot), 0, row_fractals}, {right_l1_, first * right_fractals, right_fractals},
                        rows, fractals, tiling_.right);
        AscendC::SetFlag<HardEvent::M_FIX>(kProduct);
        AscendC::WaitFlag<HardEvent::M_FIX>(kProduct);
        if constexpr (kLeft) {
          StoreProduct(product, rows, fractals);
          y = {product_l1_, 0, row_fractals};
        } else {
          Store(product, pass, 0, rows, column, fractals);
        }
        AscendC::SetFlag<HardEvent::FIX_M>(kProduct);
      }
      if constexpr (kLeft) {
        const uint32_t left_fractals = tiling_.left_padded / kFractalRows;
        const uint32_t result_size = tiling_.left_padded * fractals * kFractalRows;
        AscendC::WaitFlag<HardEvent::FIX_M>(kResult);
        for (uint32_t token = 0; token < count; ++token) {
          Multiply<true>(result[token * result_size], {left_l1_, 0, left_fractals},
                         {y.tensor, y.first + token * left_fractals, y.stride}, tiling_.left, fractals, tiling_.left);
        }
        AscendC::SetFlag<HardEvent::M_FIX>(kResult);
        AscendC::WaitFlag<HardEvent::M_FIX>(kResult);
        for (uint32_t token = 0; token < count; ++token) {
          Store(result[token * result_size], pass, token, tiling_.left, column, fractals);
        }
        AscendC::SetFlag<HardEvent::FIX_M>(kResult);
      }
    }
    AscendC::SetFlag<HardEvent::MTE1_MTE2>(slot);
  }

  // X R, rounded to T, to L1. What the last block's second product read from there it has read: FIX stored that
  // product's result first.
  __aicore__ inline void StoreProduct(const LocalTensor<float>& product, uint32_t rows, uint32_t fractals) {
    AscendC::FixpipeParamsV220 store;
    store.nSize = fractals * kFractalRows;
    store.mSize = rows;
    store.srcStride = RoundUp(rows, kFractalRows);
    store.dstStride = pass_rows_;
    store.ndNum = 1;
    store.quantPre = kRounding;
    AscendC::Fixpipe<T, float, AscendC::CFG_NZ>(product_l1_, product, store);
    AscendC::SetFlag<HardEvent::FIX_MTE1>(0);
    AscendC::WaitFlag<HardEvent::FIX_MTE1>(0);
  }

  // Rows of float32 from `token` of the pass on, columns from `column`, to the ring.
  __aicore__ inline void Store(const LocalTensor<float>& from, uint32_t pass, uint32_t token, uint32_t rows,
                               uint32_t column, uint32_t fractals) {
    AscendC::FixpipeParamsV220 store;
    store.nSize = fractals * kFractalRows;
    store.mSize = rows;
    store.srcStride = RoundUp(rows, kFractalRows);
    store.dstStride = tiling_.right_padded;
    store.ndNum = 1;
    store.quantPre = QuantMode_t::NoQuant;
    const uint32_t index =
        filled_ % kRingSlots * tiling_.slot_tokens + pass * tiling_.pass_tokens % tiling_.slot_tokens + token;
    AscendC::Fixpipe<float, float, AscendC::CFG_ROW_MAJOR>(
        z_[uint64_t{index} * tiling_.left * tiling_.right_padded + column], from, store);
  }

  static constexpr QuantMode_t kRounding = kIsHalf<T> ? QuantMode_t::F322F16 : QuantMode_t::F322BF16;

  const TilingData& tiling_;
  const TokenRange tokens_;
  LocalTensor<T> right_l1_, left_l1_, product_l1_, tokens_l1_, l0a_, l0b_;
  LocalTensor<float> l0c_;
  GlobalTensor<T> x_, left_, right_;
  GlobalTensor<float> z_;
  uint32_t pass_rows_;
  uint32_t l0_slot_ = 0;
  uint32_t filled_ = 0;  // ring slots filled
};

}  // namespace w4a4::npu
