// SPDX-License-Identifier: Apache-2.0
// AIV: per token s = (clip / 7) * max|z| and q = round_half_even(z * ((7 / clip) / max|z|)) saturated to [-8, 7], in
// float32 up to the one rounding to int4. z is what the AIC transformed, or x itself where there is no transform.
//
// float -> half rounds to odd, half -> int4 to nearest even: the first keeps 11 bits and the information whether others
// were lost, so that the second rounds as if from float32.
#pragma once

#include "common.h"

namespace w4a4::npu {

// kMaxFeatures: of a token; kBegin: the first byte of UB that it uses; kFirstEvent: it uses two events of each kind.
template <typename T, Factors kFactors, uint32_t kMaxFeatures = 32768, uint32_t kBegin = 0, uint32_t kFirstEvent = 0>
class QuantizeVector {
 public:
  static constexpr bool kHasTransform = kFactors != Factors::kNone;
  static constexpr uint32_t kChunk = 4096;  // features at a time
  static constexpr uint32_t kOutBytes = kMaxFeatures / 2;
  static constexpr uint32_t kMaxima = kMaxFeatures / kVectorLanes;
  // UB, in bytes.
  static constexpr uint32_t kTokenBytes = kMaxFeatures * sizeof(float);
  static constexpr uint32_t kFloatsAt = kBegin + kTokenBytes;
  static constexpr uint32_t kHalvesAt = kFloatsAt + kChunk * sizeof(float);
  static constexpr uint32_t kOutAt = kHalvesAt + kChunk * sizeof(half);
  static constexpr uint32_t kScaleAt = kOutAt + 2 * kOutBytes;
  static constexpr uint32_t kMaximaAt = kScaleAt + 2 * kBlockBytes;
  static constexpr uint32_t kRowMaximaAt = kMaximaAt + kMaxima * sizeof(float);
  static constexpr uint32_t kMaximumAt = kRowMaximaAt + kBlockBytes;
  static constexpr uint32_t kBroadcastAt = kMaximumAt + kBlockBytes;
  static constexpr uint32_t kInverseAt = kBroadcastAt + kVectorBlocks * kBlockBytes;
  static constexpr uint32_t kNumeratorAt = kInverseAt + kBlockBytes;
  static_assert(kNumeratorAt + kBlockBytes <= kUbBytes);
  static_assert(kMaxima <= kVectorLanes * kScaleLanes);
  // Replaces smaller maxima in the division, so that the result for an all-zero token is 0 times a finite number.
  static constexpr float kSmallest = 7.8886090522101181e-31f;  // 2^-100

  // x: T [tokens][in_features]; z: the core's ring, float [kRingSlots][slot_tokens][left][right_padded];
  // q: int4 [tokens][q_row_bytes]; scale: float [tokens][kScaleLanes].
  __aicore__ inline QuantizeVector(TBuf<TPosition::VECCALC>& ub, const TilingData& tiling, TokenRange tokens,
                                   uint32_t half_index, GM_ADDR x, GM_ADDR z, GM_ADDR q, GM_ADDR scale)
      : tiling_(tiling), tokens_(tokens), half_index_(half_index) {
    ub_ = ub.Get<uint8_t>();
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x));
    z_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(z));
    q_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(q));
    scale_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(scale));
    slots_ = tiling.in_features * 2 * sizeof(Source) <= kTokenBytes ? 2 : 1;
  }

  // Call Start and Run, then Begin and Advance for further tokens until all are quantized, then Finish.
  __aicore__ inline void Start() {
    for (uint32_t i = 0; i < slots_; ++i) AscendC::SetFlag<HardEvent::V_MTE2>(kFirstEvent + i);
    for (uint32_t i = 0; i < 2; ++i) AscendC::SetFlag<HardEvent::MTE3_V>(kFirstEvent + i);
    AscendC::Duplicate(At<float>(kNumeratorAt), tiling_.inverse_factor, kScaleLanes);
    AscendC::Duplicate(At<float>(kRowMaximaAt), 0.0f, kScaleLanes);
    AscendC::Duplicate(At<float>(kMaximumAt), 0.0f, kScaleLanes);
  }

  __aicore__ inline void Run() {
    if constexpr (kHasTransform) {
      Advance(slots());
    } else {
      for (uint32_t token = tokens_.begin + half_index_; token < tokens_.end; token += 2) {
        LoadToken(token);
        Quantize(token);
      }
    }
  }

  __aicore__ inline void Begin(TokenRange tokens) {
    tokens_ = tokens;
    taken_ = 0;
  }

  // The number of ring slots that the tokens take. Advance quantizes until `slots` of them are done.
  __aicore__ inline uint32_t slots() const { return CeilDiv(tokens_.end - tokens_.begin, tiling_.slot_tokens); }
  __aicore__ inline void Advance(uint32_t slots) {
    for (; taken_ < slots; ++taken_) {
      const uint32_t token = tokens_.begin + taken_ * tiling_.slot_tokens;
      const uint32_t count = Min(tiling_.slot_tokens, tokens_.end - token);
      AscendC::CrossCoreWaitFlag(kTokensReady);
      for (uint32_t i = half_index_; i < count; i += 2) {
        LoadTransformed(ring_ * tiling_.slot_tokens + i);
        Quantize(token + i);
      }
      AscendC::CrossCoreSetFlag<kModeGroup, PIPE_MTE2>(kTokensFree);
      ring_ = (ring_ + 1) % kRingSlots;
    }
  }

  __aicore__ inline void Finish() {
    for (uint32_t i = 0; i < slots_; ++i) AscendC::WaitFlag<HardEvent::V_MTE2>(kFirstEvent + i);
    for (uint32_t i = 0; i < 2; ++i) AscendC::WaitFlag<HardEvent::MTE3_V>(kFirstEvent + i);
  }

 private:
  using Source = typename Conditional<kHasTransform, float, T>::Type;

  template <typename U>
  __aicore__ inline LocalTensor<U> At(uint32_t byte) const {
    return ub_[byte].template ReinterpretCast<U>();
  }
  __aicore__ inline LocalTensor<Source> Token() const {
    return At<Source>(kBegin + done_ % slots_ * (kTokenBytes / 2));
  }

  // Token `index` of the ring: `left` rows of `right` values, `right_padded` apart.
  __aicore__ inline void LoadTransformed(uint32_t index) {
    const uint32_t slot = done_ % slots_;
    AscendC::WaitFlag<HardEvent::V_MTE2>(kFirstEvent + slot);
    AscendC::DataCopyExtParams copy;
    copy.blockCount = tiling_.left;
    copy.blockLen = tiling_.right * sizeof(float);
    copy.srcStride = (tiling_.right_padded - tiling_.right) * sizeof(float);
    copy.dstStride = 0;
    copy.rsv = 0;
    AscendC::DataCopyPad(Token(), z_[uint64_t{index} * tiling_.left * tiling_.right_padded], copy,
                         AscendC::DataCopyPadExtParams<float>{false, 0, 0, 0});
    AscendC::SetFlag<HardEvent::MTE2_V>(kFirstEvent + slot);
  }

  __aicore__ inline void LoadToken(uint32_t token) {
    const uint32_t slot = done_ % slots_;
    AscendC::WaitFlag<HardEvent::V_MTE2>(kFirstEvent + slot);
    AscendC::DataCopyExtParams copy;
    copy.blockCount = 1;
    copy.blockLen = tiling_.in_features * sizeof(T);
    copy.srcStride = 0;
    copy.dstStride = 0;
    copy.rsv = 0;
    AscendC::DataCopyPad(Token(), x_[uint64_t{token} * tiling_.in_features], copy,
                         AscendC::DataCopyPadExtParams<T>{false, 0, 0, 0});
    AscendC::SetFlag<HardEvent::MTE2_V>(kFirstEvent + slot);
  }

  // Features [begin, begin + count) of the token as float32.
  __aicore__ inline LocalTensor<float> Floats(uint32_t begin, uint32_t count) {
    if constexpr (kHasTransform) {
      return Token()[begin];
    } else {
      const LocalTensor<float> floats = At<float>(kFloatsAt);
      AscendC::Cast(floats, Token()[begin], AscendC::RoundMode::CAST_NONE, count);
      AscendC::PipeBarrier<PIPE_V>();
      return floats;
    }
  }

  __aicore__ inline void Quantize(uint32_t token) {
    const uint32_t slot = done_ % slots_;
    const uint32_t out_slot = done_ % 2;
    const LocalTensor<float> scale = At<float>(kScaleAt + out_slot * kBlockBytes);
    const LocalTensor<AscendC::int4b_t> out = At<AscendC::int4b_t>(kOutAt + out_slot * kOutBytes);
    AscendC::WaitFlag<HardEvent::MTE2_V>(kFirstEvent + slot);
    FindMaximum();
    AscendC::WaitFlag<HardEvent::MTE3_V>(kFirstEvent + out_slot);
    AscendC::Muls(scale, At<float>(kBroadcastAt), tiling_.scale_factor, kScaleLanes);
    Round(out);
    AscendC::SetFlag<HardEvent::V_MTE2>(kFirstEvent + slot);
    AscendC::SetFlag<HardEvent::V_MTE3>(kFirstEvent + out_slot);
    AscendC::WaitFlag<HardEvent::V_MTE3>(kFirstEvent + out_slot);
    AscendC::DataCopyExtParams copy;
    copy.blockCount = 1;
    copy.blockLen = tiling_.in_features / 2;
    copy.srcStride = 0;
    copy.dstStride = 0;
    copy.rsv = 0;
    AscendC::DataCopyPad(q_[uint64_t{token} * tiling_.q_row_bytes], out.template ReinterpretCast<int8_t>(), copy);
    copy.blockLen = kBlockBytes;
    AscendC::DataCopyPad(scale_[uint64_t{token} * kScaleLanes], scale, copy);
    AscendC::SetFlag<HardEvent::MTE3_V>(kFirstEvent + out_slot);
    ++done_;
  }

  // max|z| into every lane of the first block at kBroadcastAt, (7 / clip) / max|z| at kInverseAt.
  __aicore__ inline void FindMaximum() {
    const LocalTensor<float> floats = At<float>(kFloatsAt);
    const LocalTensor<float> maxima = At<float>(kMaximaAt);
    const LocalTensor<float> row_maxima = At<float>(kRowMaximaAt);
    const LocalTensor<float> maximum = At<float>(kMaximumAt);
    const LocalTensor<float> broadcast = At<float>(kBroadcastAt);
    const uint32_t count = CeilDiv(tiling_.in_features, kVectorLanes);
    const uint32_t rows = CeilDiv(count, kVectorLanes);
    AscendC::Duplicate(maxima, 0.0f, static_cast<int32_t>(rows * kVectorLanes));
    for (uint32_t begin = 0; begin < tiling_.in_features; begin += kChunk) {
      const uint32_t size = Min(kChunk, tiling_.in_features - begin);
      const uint32_t padded = RoundUp(size, kVectorLanes);
      AscendC::Abs(floats, Floats(begin, size), static_cast<int32_t>(size));
      if (padded > size) AscendC::Duplicate(floats[size], 0.0f, static_cast<int32_t>(padded - size));
      AscendC::PipeBarrier<PIPE_V>();
      AscendC::WholeReduceMax(maxima[begin / kVectorLanes], floats, kVectorLanes, padded / kVectorLanes, 1, 1,
                              kVectorBlocks, AscendC::ReduceOrder::ORDER_ONLY_VALUE);
      AscendC::PipeBarrier<PIPE_V>();
    }
    AscendC::WholeReduceMax(row_maxima, maxima, kVectorLanes, rows, 1, 1, kVectorBlocks,
                            AscendC::ReduceOrder::ORDER_ONLY_VALUE);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::WholeReduceMax(maximum, row_maxima, kScaleLanes, 1, 1, 1, kVectorBlocks,
                            AscendC::ReduceOrder::ORDER_ONLY_VALUE);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Brcb(broadcast, maximum, 1, {1, kVectorBlocks});
    AscendC::PipeBarrier<PIPE_V>();
    const LocalTensor<float> inverse = At<float>(kInverseAt);
    AscendC::Maxs(inverse, broadcast, kSmallest, kScaleLanes);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Div(inverse, At<float>(kNumeratorAt), inverse, kScaleLanes);
    AscendC::PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Round(const LocalTensor<AscendC::int4b_t>& out) {
    const LocalTensor<float> floats = At<float>(kFloatsAt);
    const LocalTensor<half> halves = At<half>(kHalvesAt);
    const LocalTensor<float> inverse = At<float>(kInverseAt);
    const AscendC::BinaryRepeatParams broadcast{1, 1, 0, kVectorBlocks, kVectorBlocks, 0};
    for (uint32_t begin = 0; begin < tiling_.in_features; begin += kChunk) {
      const uint32_t size = Min(kChunk, tiling_.in_features - begin);
      const LocalTensor<float> source = Floats(begin, size);
      const uint32_t whole = size / kVectorLanes * kVectorLanes;
      if (whole > 0) {
        AscendC::Mul(floats, source, inverse, uint64_t{kVectorLanes}, static_cast<uint8_t>(whole / kVectorLanes),
                     broadcast);
      }
      if (whole < size) AscendC::Mul(floats[whole], source[whole], inverse, uint64_t{size - whole}, 1, broadcast);
      AscendC::PipeBarrier<PIPE_V>();
      AscendC::Cast(halves, floats, AscendC::RoundMode::CAST_ODD, size);
      AscendC::PipeBarrier<PIPE_V>();
      AscendC::Cast(out[begin], halves, AscendC::RoundMode::CAST_RINT, size);
    }
  }

  const TilingData& tiling_;
  TokenRange tokens_;
  const uint32_t half_index_;
  LocalTensor<uint8_t> ub_;
  GlobalTensor<T> x_;
  GlobalTensor<float> z_, scale_;
  GlobalTensor<int8_t> q_;
  uint32_t slots_;
  uint32_t done_ = 0;   // tokens quantized
  uint32_t taken_ = 0;  // ring slots of the tokens since Begin
  uint32_t ring_ = 0;
};

}  // namespace w4a4::npu
