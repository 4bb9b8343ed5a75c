// SPDX-License-Identifier: Apache-2.0
// AIC: z = L^T (X R) of each of the core's tokens, X being the token as a matrix [left, right].
//
// In a pass the rows of `pass_tokens` tokens form one operand; a unit is `block_columns` columns of a pass. For each
// unit y = X R goes to L0C and, rounded to T, back to L1; then L^T y, for each token, goes in float32 to the ring in
// workspace. A missing factor omits its product. The first product of a unit is issued before the second product of the
// previous unit, so that FIX, the slowest pipe here, always has something to store. Operands of type T are loaded as
// stored; the fractals that the cube needs transposed (R, y, L^T) are transposed on their way to L0.
#pragma once

#include "common.h"

namespace w4a4::npu {

template <typename T, Factors kFactors>
class TransformCube {
 public:
  static constexpr bool kLeft = kFactors == Factors::kLeft || kFactors == Factors::kBoth;
  static constexpr bool kRight = kFactors == Factors::kRight || kFactors == Factors::kBoth;

  // Bytes of L1 that the transform uses, with `slots` passes of tokens in it.
  __aicore__ static inline uint32_t L1Bytes(const TilingData& tiling, uint32_t slots) {
    const uint32_t rows = tiling.pass_tokens * tiling.left_padded;
    const uint32_t right = kRight ? tiling.right_padded * tiling.right_padded : 0;
    const uint32_t left = kLeft ? tiling.left_padded * tiling.left_padded : 0;
    const uint32_t products = kLeft && kRight ? 2 * rows * tiling.block_columns : 0;
    return (right + left + products + slots * rows * tiling.right_padded) * sizeof(T);
  }

  // l1_begin: byte where the transform's part of L1 begins; it goes to the end. x: T [tokens][in_features]; left: T
  // [left][left]; right: T [right][right]; z: the core's ring, float [kRingSlots][slot_tokens][left][right_padded].
  __aicore__ inline TransformCube(CubeBuffers& buffers, uint32_t l1_begin, const TilingData& tiling, TokenRange tokens,
                                  GM_ADDR x, GM_ADDR left, GM_ADDR right, GM_ADDR z)
      : tiling_(tiling), tokens_(tokens), l0_(tiling, true) {
    pass_rows_ = tiling.pass_tokens * tiling.left_padded;
    passes_ = CeilDiv(tokens.end - tokens.begin, tiling.pass_tokens);
    if (tiling.chunks > 1) {
      sums_at_ = 2 * kPipelinedTileSums;
      sums_ = kPipelinedTransformSums;
      l0c_slots_ = 2;
    }
    first_result_ = kLeft && kRight ? kProduct + 1 : 0;
    blocks_ = CeilDiv(tiling.right_padded, tiling.block_columns);
    const uint32_t right_at = l1_begin / sizeof(T);
    const uint32_t left_at = right_at + (kRight ? tiling.right_padded * tiling.right_padded : 0);
    const uint32_t product_at = left_at + (kLeft ? tiling.left_padded * tiling.left_padded : 0);
    const uint32_t tokens_at = product_at + (kLeft && kRight ? 2 * pass_rows_ * tiling.block_columns : 0);
    slots_ = 2;
    while (slots_ < kMaxSlots && l1_begin + L1Bytes(tiling, slots_ + 1) <= kL1Bytes) ++slots_;
    const LocalTensor<T> l1 = buffers.l1.Get<T>();
    right_l1_ = l1[right_at];
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

  // Whether Start already issues all loads.
  __aicore__ inline bool IssuesAllLoads() const { return passes_ <= slots_; }

  // Call Start, Transform and Finish in this order. Before Finish, further tokens take a Begin and any number of calls
  // of Advance, of which the last reaches all units. Start loads the factors and as many passes as fit.
  __aicore__ inline void Start() {
    for (uint32_t i = 0; i < slots_; ++i) AscendC::SetFlag<HardEvent::MTE1_MTE2>(kTokensEvent + i);
    for (uint32_t i = 0; i < l0c_slots_; ++i) AscendC::SetFlag<HardEvent::FIX_M>(kSumsEvent + i);
    if constexpr (kRight) LoadMatrix(right_l1_, right_, tiling_.right);
    if constexpr (kLeft) LoadMatrix(left_l1_, left_, tiling_.left);
    for (uint32_t i = 0; i < Min(passes_, slots_); ++i) LoadTokens(i);
  }

  __aicore__ inline uint32_t units() const { return passes_ * blocks_; }

  __aicore__ inline void Transform() {
    const uint32_t units = passes_ * blocks_;
    if constexpr (kLeft && kRight) {
      if (units > 0) FirstProduct(0);
    }
    for (uint32_t unit = 0; unit < units; ++unit) {
      if constexpr (kLeft && kRight) {
        if (unit + 1 < units) FirstProduct(unit + 1);
      }
      Result(unit);
    }
  }

  __aicore__ inline void Begin(TokenRange tokens) {
    tokens_ = tokens;
    passes_ = CeilDiv(tokens.end - tokens.begin, tiling_.pass_tokens);
    done_ = 0;
    for (uint32_t i = 0; i < Min(passes_, slots_); ++i) LoadTokens(i);
    if constexpr (kLeft && kRight) {
      if (passes_ > 0) FirstProduct(0);
    }
  }

  // Continues until `units` are done. Each unit's first product is issued right after the previous unit, so that its X
  // R is stored during the other work between two calls.
  __aicore__ inline void Advance(uint32_t units) {
    for (; done_ < units; ++done_) {
      Result(done_);
      if constexpr (kLeft && kRight) {
        if (done_ + 1 < passes_ * blocks_) FirstProduct(done_ + 1);
      }
    }
  }

  __aicore__ inline void Finish() {
    for (uint32_t i = 0; i < slots_; ++i) AscendC::WaitFlag<HardEvent::MTE1_MTE2>(kTokensEvent + i);
    for (uint32_t i = 0; i < l0c_slots_; ++i) AscendC::WaitFlag<HardEvent::FIX_M>(kSumsEvent + i);
    for (uint32_t i = 0; i < Min(filled_, kRingSlots); ++i) AscendC::CrossCoreWaitFlag(kTokensFree);
  }

 private:
  // MTE1_MTE2 and MTE2_MTE1; the GEMM uses lower ids. The first tokens' event covers the factors, which are loaded
  // before.
  static constexpr uint32_t kTokensEvent = 4;
  static constexpr uint32_t kMaxSlots = 4;
  // M_FIX and FIX_M of the slots of L0C; the GEMM uses 0 and 1.
  static constexpr uint32_t kSumsEvent = 2;
  // Slots of L0C: one for the first product, if there are two products, and the others for results.
  static constexpr uint32_t kMaxL0CSlots = 3;
  static constexpr uint32_t kProduct = 0;
  static_assert(kPipelinedStages <= kTokensEvent);
  static_assert(kMaxL0CSlots * kTransformSums * sizeof(float) <= kL0CBytes);

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

  __aicore__ inline uint32_t TokensOfPass(uint32_t pass) const {
    return Min(tiling_.pass_tokens, tokens_.end - tokens_.begin - pass * tiling_.pass_tokens);
  }

  // L1 holds NZ: [column / 16][pass_rows_][16].
  __aicore__ inline void LoadTokens(uint32_t pass) {
    const uint32_t slot = pass % slots_;
    AscendC::WaitFlag<HardEvent::MTE1_MTE2>(kTokensEvent + slot);
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
    AscendC::SetFlag<HardEvent::MTE2_MTE1>(kTokensEvent + slot);
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
    const uint32_t most = l0_.bytes / sizeof(T) / kHalfFractal / widest;
    const uint32_t depth_fractals = CeilDiv(depth, kFractalRows);
    for (uint32_t first = 0; first < depth_fractals; first += most) {
      const uint32_t fractals = Min(most, depth_fractals - first);
      const uint32_t at = (l0_.begin + l0_slot_ * l0_.bytes) / sizeof(T);
      const LocalTensor<T> l0a = l0a_[at];
      const LocalTensor<T> l0b = l0b_[at];
      AscendC::WaitFlag<HardEvent::M_MTE1>(l0_.free_event + l0_slot_);
      LoadFractals(l0a, a.tensor, kHalfFractal, a.first + first * (kTransposeA ? 1 : a.stride), row_fractals,
                   kTransposeA ? a.stride : 1, fractals, kTransposeA ? 1 : a.stride, kTransposeA);
      LoadFractals(l0b, b.tensor, kHalfFractal, b.first + first, fractals, 1, column_fractals, b.stride, true);
      AscendC::SetFlag<HardEvent::MTE1_M>(l0_.load_event + l0_slot_);
      AscendC::WaitFlag<HardEvent::MTE1_M>(l0_.load_event + l0_slot_);
      if (first > 0 && row_fractals * column_fractals < kOrderedMmadFractals) AscendC::PipeBarrier<PIPE_M>();
      AscendC::MmadParams multiply;
      multiply.m = rows;
      multiply.n = column_fractals * kFractalRows;
      multiply.k = Min(fractals * kFractalRows, depth - first * kFractalRows);
      multiply.cmatrixInitVal = first == 0;
      AscendC::Mmad(c, l0a, l0b, multiply);
      AscendC::SetFlag<HardEvent::M_MTE1>(l0_.free_event + l0_slot_);
      l0_slot_ ^= 1;
    }
  }

  // Columns [first * 16, (first + fractals) * 16) of a pass.
  struct Unit {
    uint32_t pass;
    uint32_t first;
    uint32_t fractals;
    bool is_first;  // of its pass
    bool is_last;   // of its pass
  };

  __aicore__ inline Unit UnitAt(uint32_t index) const {
    const uint32_t block = index % blocks_, column = block * tiling_.block_columns;
    return {index / blocks_, column / kFractalRows,
            Min(tiling_.block_columns, tiling_.right_padded - column) / kFractalRows, block == 0, block + 1 == blocks_};
  }

  __aicore__ inline LocalTensor<float> Sums(uint32_t slot) const { return l0c_[sums_at_ + slot * sums_]; }

  // X as an operand: the first unit of its pass waits for it, the last one frees its slot.
  __aicore__ inline void AcquireTokens(const Unit& unit) {
    if (unit.is_first) AscendC::WaitFlag<HardEvent::MTE2_MTE1>(kTokensEvent + unit.pass % slots_);
  }
  __aicore__ inline void ReleaseTokens(const Unit& unit) {
    if (!unit.is_last) return;
    AscendC::SetFlag<HardEvent::MTE1_MTE2>(kTokensEvent + unit.pass % slots_);
    if (unit.pass + slots_ < passes_) LoadTokens(unit.pass + slots_);
  }

  // X R of a unit.
  __aicore__ inline void MultiplyRight(const Unit& unit, uint32_t slot) {
    const uint32_t right_fractals = tiling_.right_padded / kFractalRows;
    AcquireTokens(unit);
    AscendC::WaitFlag<HardEvent::FIX_M>(kSumsEvent + slot);
    Multiply<false>(Sums(slot), {TokensL1(unit.pass % slots_), 0, pass_rows_ / kFractalRows},
                    {right_l1_, unit.first * right_fractals, right_fractals}, Rows(unit), unit.fractals, tiling_.right);
    ReleaseTokens(unit);
    AscendC::SetFlag<HardEvent::M_FIX>(kSumsEvent + slot);
    AscendC::WaitFlag<HardEvent::M_FIX>(kSumsEvent + slot);
  }

  __aicore__ inline uint32_t Rows(const Unit& unit) const { return TokensOfPass(unit.pass) * tiling_.left; }

  __aicore__ inline LocalTensor<T> ProductL1(uint32_t index) const {
    return product_l1_[index % 2 * pass_rows_ * tiling_.block_columns];
  }

  // Stores X R, rounded to T, in L1. It overwrites the product of two units before, which has been read: FIX has stored
  // that unit's result already.
  __aicore__ inline void FirstProduct(uint32_t index) {
    const Unit unit = UnitAt(index);
    MultiplyRight(unit, kProduct);
    AscendC::FixpipeParamsV220 store;
    store.nSize = unit.fractals * kFractalRows;
    store.mSize = Rows(unit);
    store.srcStride = RoundUp(Rows(unit), kFractalRows);
    store.dstStride = pass_rows_;
    store.ndNum = 1;
    store.quantPre = kRounding;
    AscendC::Fixpipe<T, float, AscendC::CFG_NZ>(ProductL1(index), Sums(kProduct), store);
    AscendC::SetFlag<HardEvent::FIX_M>(kSumsEvent + kProduct);
    AscendC::SetFlag<HardEvent::FIX_MTE1>(index % 2);
  }

  __aicore__ inline void Result(uint32_t index) {
    const Unit unit = UnitAt(index);
    const uint32_t slot = first_result_ + index % (l0c_slots_ - first_result_);
    const uint32_t count = TokensOfPass(unit.pass);
    const uint32_t left_fractals = tiling_.left_padded / kFractalRows;
    const uint32_t size = tiling_.left_padded * unit.fractals * kFractalRows;
    if constexpr (kLeft) {
      Operand y{ProductL1(index), 0, pass_rows_ / kFractalRows};
      if constexpr (kRight) {
        AscendC::WaitFlag<HardEvent::FIX_MTE1>(index % 2);
      } else {
        AcquireTokens(unit);
        y = {TokensL1(unit.pass % slots_), unit.first * (pass_rows_ / kFractalRows), pass_rows_ / kFractalRows};
      }
      AscendC::WaitFlag<HardEvent::FIX_M>(kSumsEvent + slot);
      for (uint32_t token = 0; token < count; ++token) {
        Multiply<true>(Sums(slot)[token * size], {left_l1_, 0, left_fractals},
                       {y.tensor, y.first + token * left_fractals, y.stride}, tiling_.left, unit.fractals,
                       tiling_.left);
      }
      if constexpr (!kRight) ReleaseTokens(unit);
      AscendC::SetFlag<HardEvent::M_FIX>(kSumsEvent + slot);
      AscendC::WaitFlag<HardEvent::M_FIX>(kSumsEvent + slot);
    } else {
      MultiplyRight(unit, slot);
    }

    const uint32_t slot_passes = tiling_.slot_tokens / tiling_.pass_tokens;
    const uint32_t slot_pass = unit.pass % slot_passes;
    if (unit.is_first && slot_pass == 0 && filled_ >= kRingSlots) AscendC::CrossCoreWaitFlag(kTokensFree);
    if constexpr (kLeft) {
      for (uint32_t token = 0; token < count; ++token) {
        Store(Sums(slot)[token * size], slot_pass * tiling_.pass_tokens + token, tiling_.left, unit);
      }
    } else {
      Store(Sums(slot), slot_pass * tiling_.pass_tokens, Rows(unit), unit);
    }
    AscendC::SetFlag<HardEvent::FIX_M>(kSumsEvent + slot);
    if (!unit.is_last || (slot_pass + 1 < slot_passes && unit.pass + 1 < passes_)) return;
    AscendC::CrossCoreSetFlag<kModeGroup, PIPE_FIX>(kTokensReady);
    ++filled_;
  }

  // Stores float32 rows in the unit's columns of the ring slot, from token `token` on.
  __aicore__ inline void Store(const LocalTensor<float>& from, uint32_t token, uint32_t rows, const Unit& unit) {
    AscendC::FixpipeParamsV220 store;
    store.nSize = unit.fractals * kFractalRows;
    store.mSize = rows;
    store.srcStride = RoundUp(rows, kFractalRows);
    store.dstStride = tiling_.right_padded;
    store.ndNum = 1;
    store.quantPre = QuantMode_t::NoQuant;
    const uint64_t index = filled_ % kRingSlots * tiling_.slot_tokens + token;
    AscendC::Fixpipe<float, float, AscendC::CFG_ROW_MAJOR>(
        z_[index * tiling_.left * tiling_.right_padded + unit.first * kFractalRows], from, store);
  }

  static constexpr QuantMode_t kRounding = kIsHalf<T> ? QuantMode_t::F322F16 : QuantMode_t::F322BF16;

  const TilingData& tiling_;
  TokenRange tokens_;
  const L0Slots l0_;
  LocalTensor<T> right_l1_, left_l1_, product_l1_, tokens_l1_, l0a_, l0b_;
  LocalTensor<float> l0c_;
  GlobalTensor<T> x_, left_, right_;
  GlobalTensor<float> z_;
  uint32_t pass_rows_, passes_, blocks_;
  uint32_t slots_;                                // passes whose tokens L1 holds
  uint32_t sums_at_ = 0, sums_ = kTransformSums;  // where the L0C slots begin, and the sums of one
  uint32_t l0c_slots_ = kMaxL0CSlots;
  uint32_t first_result_;
  uint32_t l0_slot_ = 0;
  uint32_t done_ = 0;    // units of the tokens since Begin
  uint32_t filled_ = 0;  // ring slots filled
};

}  // namespace w4a4::npu
