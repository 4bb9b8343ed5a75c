// SPDX-License-Identifier: Apache-2.0
// One launch for a whole W4A4 linear, and its two phases alone. Every core is an AIC with two AIVs.
//
// Few tokens (`replicated`): every core transforms and quantizes all tokens for itself, so that it waits only for its
// own AIVs. Many tokens: each core transforms a share of them, and a barrier over all AIVs comes before the first tile.
// Even more are processed in chunks: the next chunk's tokens are transformed and quantized between the tiles of this
// one, and the barrier comes between tiles too.
#pragma once

#include "common.h"
#include "epilogue_vector.h"
#include "gemm_cube.h"
#include "quantize_vector.h"
#include "transform_cube.h"

namespace w4a4::npu {

// Addresses in global memory. The factors and the bias are null where the linear has none.
struct LinearAddresses {
  GM_ADDR x;             // T [tokens][in_features]
  GM_ADDR left;          // T [left][left]
  GM_ADDR right;         // T [right][right]
  GM_ADDR weight;        // int4 nZ [in / 64][out / 16][16][64]
  GM_ADDR weight_scale;  // float [groups][out_features]
  GM_ADDR bias;          // float [out_features]
  GM_ADDR y;             // T [tokens][out_features]
  GM_ADDR q;             // int4 [tokens][q_row_bytes], and the scales float [tokens][8]: workspace, which carries
  GM_ADDR scale;         // them to the second launch if the phases are launched separately
  GM_ADDR z;             // workspace
  GM_ADDR acc;           // workspace
};

__aicore__ inline LinearAddresses AddWorkspace(LinearAddresses at, GM_ADDR workspace, const TilingData& tiling) {
  at.q = workspace + tiling.q_offset;
  at.scale = workspace + tiling.scale_offset;
  at.z = workspace + tiling.z_offset;
  at.acc = workspace + tiling.acc_offset;
  return at;
}

// With the workspace that belongs to one core alone.
template <uint32_t kRows>
__aicore__ inline LinearAddresses AddressesOfCore(LinearAddresses at, const TilingData& tiling, uint32_t core) {
  if (tiling.replicated) {
    at.q += uint64_t{core} * tiling.tokens * tiling.q_row_bytes;
    at.scale += uint64_t{core} * tiling.tokens * kBlockBytes;
  }
  at.z += uint64_t{core} * kRingSlots * tiling.slot_tokens * tiling.left * tiling.right_padded * sizeof(float);
  at.acc += uint64_t{core} * kRingSlots * kRows * kMaxTileColumns * sizeof(int32_t);
  return at;
}

// What an AIC does between the products of a chunk's tiles: nothing, or transform the next chunk.
struct NoTransform {
  __aicore__ inline void operator()(uint32_t) const {}
};
template <typename Transform>
struct TransformBetween {
  Transform& transform;
  Pace pace;
  __aicore__ inline void operator()(uint32_t slots) const { transform.Advance(pace.After(slots)); }
};

// AIV: lets the AIC read the chunk's int4 activations once those of all cores that it needs are in global memory.
__aicore__ inline void PublishActivations(const TilingData& tiling) {
  if (!tiling.replicated) {
    AscendC::CrossCoreSetFlag<kModeAllVectors, PIPE_MTE3>(kGrid);
    AscendC::CrossCoreWaitFlag(kGrid);
  }
  AscendC::CrossCoreSetFlag<kModeGroup, PIPE_MTE3>(kActivationsReady);
}

// What an AIV does before a tile: nothing, or quantize what its AIC has transformed by then. AIC and AIV follow the
// same order, so that neither ring can fill up while a core waits for the other.
struct NoQuantization {
  __aicore__ inline void operator()(uint32_t) {}
};
template <typename Quantize>
struct QuantizeBetween {
  Quantize& quantize;
  const TilingData& tiling;
  TransformUnits units;
  Pace pace;
  bool is_published = false;

  __aicore__ inline QuantizeBetween(Quantize& of, const TilingData& data, TokenRange tokens, uint32_t tiles)
      : quantize(of), tiling(data), units(data, tokens), pace(data, units.count, tiles) {
    quantize.Begin(tokens);
  }
  __aicore__ inline void operator()(uint32_t tile) { Until(pace.AtEnd(tile)); }
  __aicore__ inline void Until(uint32_t done) {
    if (is_published) return;
    quantize.Advance(units.SlotsOf(done));
    if (done < units.count) return;
    PublishActivations(tiling);
    is_published = true;
  }
};

template <typename T, Factors kFactors, uint32_t kRows, uint32_t kPhases>
__aicore__ inline void RunCube(AscendC::TPipe& pipe, const LinearAddresses& at, const TilingData& tiling, uint32_t core,
                               uint32_t cores) {
  CubeBuffers buffers;
  buffers.Init(pipe);
  // Transform and GEMM use the same slots one after the other, or each has its own.
  const L0Slots first(tiling, false), second(tiling, true);
  first.Open();
  if (tiling.chunks > 1) second.Open();
  GemmCube<kRows> gemm(buffers, tiling, core, cores, at.q, at.weight, at.acc);
  constexpr bool kWaits = (kPhases & 1) != 0;
  if constexpr ((kPhases & 1) && kFactors != Factors::kNone) {
    using Transform = TransformCube<T, kFactors>;
    // Weights can be loaded before the transform ends if it has a part of L1 to itself and all its loads are issued.
    const uint32_t left_over = kL1Bytes - Transform::L1Bytes(tiling, 2);
    if (gemm.L1Bytes(2) <= left_over && left_over < gemm.L1Bytes(gemm.stages())) gemm.UseStages(2);
    const uint32_t gemm_bytes = gemm.L1Bytes(gemm.stages());
    const bool is_apart = (kPhases & 2) && gemm_bytes <= left_over;
    Transform transform(buffers, is_apart ? gemm_bytes : 0, tiling, TokensOf(tiling, Chunk(tiling, 0), core, cores),
                        at.x, at.left, at.right, at.z);
    const bool is_early = is_apart && transform.IssuesAllLoads();
    transform.Start();
    if (is_early) gemm.Start();
    transform.Transform();
    if ((kPhases & 2) && !is_early) gemm.Start();
    if (tiling.chunks == 1) transform.Finish();
    if constexpr (kPhases & 2) {
      for (uint32_t chunk = 0; chunk + 1 < tiling.chunks; ++chunk) {
        transform.Begin(TokensOf(tiling, Chunk(tiling, chunk + 1), core, cores));
        const Pace pace(tiling, transform.units(), gemm.tiles());
        gemm.Run(kWaits, TransformBetween<Transform>{transform, pace});
        transform.Advance(transform.units());
        gemm.Next(chunk + 1);
      }
      gemm.Run(kWaits, NoTransform{});
    }
    if (tiling.chunks > 1) transform.Finish();
  } else if constexpr (kPhases & 2) {
    gemm.Start();
    gemm.Run(kWaits, NoTransform{});
  }
  if constexpr (kPhases & 2) gemm.Finish();
  first.Close();
  if (tiling.chunks > 1) second.Close();
}

template <typename T, Factors kFactors, uint32_t kRows, uint32_t kPhases>
__aicore__ inline void RunVector(AscendC::TPipe& pipe, const LinearAddresses& at, const TilingData& tiling,
                                 uint32_t core, uint32_t cores) {
  using Epilogue = EpilogueVector<T, kRows>;
  const uint32_t half_index = AscendC::GetSubBlockIdx();
  const TokenRange tokens = TokensOf(tiling, Chunk(tiling, 0), core, cores);
  TBuf<TPosition::VECCALC> ub;
  pipe.InitBuffer(ub, kUbBytes);
  if constexpr (kRows == 128 && kPhases == 3 && kFactors != Factors::kNone) {
    if (tiling.chunks > 1) {
      using Quantize = QuantizeVector<T, kFactors, kPipelinedMaxFeatures, Epilogue::kBytes, Epilogue::kEvents>;
      Quantize quantize(ub, tiling, tokens, half_index, at.x, at.z, at.q, at.scale);
      Epilogue epilogue(ub, tiling, core, cores, half_index, at.scale, at.weight_scale, at.bias, at.acc, at.y);
      quantize.Start();
      quantize.Run();
      PublishActivations(tiling);
      epilogue.Start();
      for (uint32_t chunk = 0; chunk + 1 < tiling.chunks; ++chunk) {
        QuantizeBetween<Quantize> between(quantize, tiling, TokensOf(tiling, Chunk(tiling, chunk + 1), core, cores),
                                          epilogue.tiles());
        epilogue.Run(between);
        between.Until(between.units.count);
        epilogue.Next(chunk + 1);
      }
      NoQuantization nothing;
      epilogue.Run(nothing);
      epilogue.Finish();
      quantize.Finish();
      return;
    }
  }
  if constexpr (kPhases & 1) {
    QuantizeVector<T, kFactors> quantize(ub, tiling, tokens, half_index, at.x, at.z, at.q, at.scale);
    quantize.Start();
    quantize.Run();
    quantize.Finish();
  }
  if constexpr (kPhases == 3) PublishActivations(tiling);
  if constexpr (kPhases & 2) {
    Epilogue epilogue(ub, tiling, core, cores, half_index, at.scale, at.weight_scale, at.bias, at.acc, at.y);
    NoQuantization nothing;
    epilogue.Start();
    epilogue.Run(nothing);
    epilogue.Finish();
  }
}

// kPhases: 1 transform and quantize, 2 multiply, 3 both.
template <typename T, Factors kFactors, uint32_t kRows, uint32_t kPhases>
__aicore__ inline void FlatQuantLinear(const LinearAddresses& addresses, const TilingData& tiling) {
  AscendC::TPipe pipe;
  const uint32_t cores = AscendC::GetBlockNum();
  if ASCEND_IS_AIC {
    const uint32_t core = AscendC::GetBlockIdx();
    RunCube<T, kFactors, kRows, kPhases>(pipe, AddressesOfCore<kRows>(addresses, tiling, core), tiling, core, cores);
  }
  if ASCEND_IS_AIV {
    const uint32_t core = AscendC::GetBlockIdx() / AscendC::GetSubBlockNum();
    RunVector<T, kFactors, kRows, kPhases>(pipe, AddressesOfCore<kRows>(addresses, tiling, core), tiling, core, cores);
  }
}

}  // namespace w4a4::npu
