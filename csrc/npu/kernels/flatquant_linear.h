// SPDX-License-Identifier: Apache-2.0
// One launch for a whole W4A4 linear, and its two phases alone. Every core is an AIC with two AIVs.
//
// Few tokens (`replicated`): every core transforms and quantizes all tokens for itself, so that nothing is waited for
// but its own AIVs. Many: each core takes its share; a barrier over all AIVs comes before the first tile.
#pragma once

#include "common.h"
#include "epilogue_vector.h"
#include "gemm_cube.h"
#include "quantize_vector.h"
#include "transform_cube.h"

namespace w4a4::npu {

// Where things are in global memory. The factors and the bias may be null where the linear has none.
struct LinearAddresses {
  GM_ADDR x;             // T [tokens][in_features]
  GM_ADDR left;          // T [left][left]
  GM_ADDR right;         // T [right][right]
  GM_ADDR weight;        // int4 nZ [in / 64][out / 16][16][64]
  GM_ADDR weight_scale;  // float [groups][out_features]
  GM_ADDR bias;          // float [out_features]
  GM_ADDR y;             // T [tokens][out_features]
  GM_ADDR q;             // int4 [tokens][q_row_bytes], and the scales float [tokens][8]: workspace of the one launch,
  GM_ADDR scale;         // between the two launches if the phases are launched alone
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

// What belongs to core `core` alone.
template <uint32_t kRows>
__aicore__ inline LinearAddresses OfCore(LinearAddresses at, const TilingData& tiling, uint32_t core) {
  if (tiling.replicated) {
    at.q += uint64_t{core} * tiling.tokens * tiling.q_row_bytes;
    at.scale += uint64_t{core} * tiling.tokens * kBlockBytes;
  }
  at.z += uint64_t{core} * kRingSlots * tiling.slot_tokens * tiling.left * tiling.right_padded * sizeof(float);
  at.acc += uint64_t{core} * kRingSlots * kRows * kMaxTileColumns * sizeof(int32_t);
  return at;
}

// kPhases: 1 transform and quantize, 2 multiply, 3 both.
template <typename T, Factors kFactors, uint32_t kRows, uint32_t kPhases>
__aicore__ inline void FlatQuantLinear(const LinearAddresses& addresses, const TilingData& tiling) {
  AscendC::TPipe pipe;
  const uint32_t cores = AscendC::GetBlockNum();
  if ASCEND_IS_AIC {
    const uint32_t core = AscendC::GetBlockIdx();
    const LinearAddresses at = OfCore<kRows>(addresses, tiling, core);
    CubeBuffers buffers;
    buffers.Init(pipe);
    GemmCube<kRows> gemm(buffers, tiling, core, cores, at.q, at.weight, at.acc);
    if constexpr ((kPhases & 1) && kFactors != Factors::kNone) {
      using Transform = TransformCube<T, kFactors>;
      // Weights may come before the transform is done if it has L1 of its own and all its loads are issued.
      const uint32_t left_over = kL1Bytes - Transform::L1Bytes(tiling, 2);
      if (gemm.L1Bytes(2) <= left_over && left_over < gemm.L1Bytes(gemm.stages())) gemm.UseStages(2);
      const uint32_t gemm_bytes = gemm.L1Bytes(gemm.stages());
      const bool is_apart = (kPhases & 2) && gemm_bytes <= left_over;
      Transform transform(buffers, is_apart ? gemm_bytes : 0, tiling, TokensOf(tiling, core, cores), at.x, at.left,
                          at.right, at.z);
      const bool is_early = is_apart && transform.LoadsAtOnce();
      transform.Start();
      if (is_early) gemm.Prefetch();
      transform.Transform();
      if ((kPhases & 2) && !is_early) gemm.Prefetch();
      transform.Finish();
    } else if constexpr (kPhases & 2) {
      gemm.Prefetch();
    }
    if constexpr (kPhases & 2) gemm.Run((kPhases & 1) != 0);
  }
  if ASCEND_IS_AIV {
    const uint32_t core = AscendC::GetBlockIdx() / AscendC::GetSubBlockNum();
    const uint32_t half_index = AscendC::GetSubBlockIdx();
    const LinearAddresses at = OfCore<kRows>(addresses, tiling, core);
    TBuf<TPosition::VECCALC> ub;
    pipe.InitBuffer(ub, kUbBytes);
    if constexpr (kPhases & 1) {
      QuantizeVector<T, kFactors> quantize(ub, tiling, TokensOf(tiling, core, cores), half_index, at.x, at.z, at.q,
                                           at.scale);
      quantize.Run();
    }
    if constexpr (kPhases == 3) {
      if (!tiling.replicated) {
        AscendC::CrossCoreSetFlag<kModeAllVectors, PIPE_MTE3>(kGrid);
        AscendC::CrossCoreWaitFlag(kGrid);
      }
      AscendC::CrossCoreSetFlag<kModeGroup, PIPE_MTE3>(kActivationsReady);
    }
    if constexpr (kPhases & 2) {
      EpilogueVector<T, kRows> epilogue(ub, tiling, core, cores, half_index, at.scale, at.weight_scale, at.bias, at.acc,
                                        at.y);
      epilogue.Run();
    }
  }
}

}  // namespace w4a4::npu
