// SPDX-License-Identifier: Apache-2.0
// What the host decides and the kernels read: one struct, passed to a kernel by value. Plain C++, included by host,
// device and tests. Lengths are in elements unless a name says bytes.
#pragma once

#include <cstdint>

namespace w4a4::npu {

// Which Kronecker factors a linear has; a missing one is the identity.
enum class Factors : uint32_t { kNone = 0, kLeft = 1, kRight = 2, kBoth = 3 };

// The largest number of rows of a GEMM tile. Few tokens use small tiles, whose weights stream through a deeper
// pipeline.
enum class TokenClass : uint32_t { kRows16 = 16, kRows32 = 32, kRows64 = 64, kRows128 = 128 };

inline constexpr uint32_t kFractalRows = 16;   // rows of every cube fractal, and columns of a B fractal
inline constexpr uint32_t kInt4FractalK = 64;  // int4 values in 32 bytes
inline constexpr uint32_t kMaxTileColumns = 256;
inline constexpr uint32_t kResidentTileColumns = 128;  // of large tiles whose activations stay in L1
inline constexpr uint32_t kGemmStepK = 1024;           // depth of one L1 stage
inline constexpr uint32_t kTransformSums = 10752;      // float32 sums of a transform unit: a third of L0C, in KiB
// If the transform alternates with the steps of the GEMM, each has half of L0A and L0B, and L0C holds two tiles and two
// units. Stages of L1 are then shorter, and there are more of them if there is room.
inline constexpr uint32_t kPipelinedDepth = 256;  // of an L0 slot
inline constexpr uint32_t kPipelinedStages = 4;
inline constexpr uint32_t kPipelinedTileSums = 12288;
inline constexpr uint32_t kPipelinedTransformSums = 4096;
inline constexpr uint32_t kPipelinedMaxFeatures = 8192;  // of a token that shares UB with the epilogue
inline constexpr uint32_t kBlockBytes = 32;              // a data block; a token's scale fills one (8 equal floats)
inline constexpr uint32_t kScaleLanes = kBlockBytes / sizeof(float);
inline constexpr uint32_t kRingSlots = 2;  // workspace slots between an AIC and its two AIVs

struct TilingData {
  // The linear: y[tokens, out] = x[tokens, in] W^T.
  uint32_t tokens;
  uint32_t in_features;
  uint32_t out_features;
  uint32_t group_size;  // input features under one weight scale; in_features for per-channel scales
  uint32_t groups;
  uint32_t has_bias;
  float scale_factor;    // clip_ratio / 7: a token's scale is this times its largest magnitude
  float inverse_factor;  // 7 / clip_ratio

  // Transform: X' = L^T (X R) with X [left, right] per token.
  uint32_t left;
  uint32_t right;
  uint32_t left_padded;  // multiples of 16
  uint32_t right_padded;
  uint32_t pass_tokens;    // tokens whose rows form one A operand
  uint32_t slot_tokens;    // tokens of one ring slot, a multiple of pass_tokens
  uint32_t block_columns;  // columns of X R and of the result that are computed at once, a multiple of 16
  uint32_t replicated;     // 1: every core transforms all tokens; 0: each core a share, then a grid barrier

  // GEMM.
  uint32_t tile_rows;     // rows of a tile, a multiple of 16 up to the token class
  uint32_t tile_columns;  // a multiple of 16, at most kMaxTileColumns
  uint32_t row_tiles;
  uint32_t column_tiles;
  // 1: L1 keeps all activations of a row of tiles while the weights of its tiles are streamed; a core's tiles are
  // neighbours in a row. 0: activations and weights are streamed together.
  uint32_t resident;
  uint32_t step_depth;  // depth of one L1 stage
  // A single chunk has all tokens. Several chunks are whole rows of tiles each; while one is multiplied, the next one
  // is transformed.
  uint32_t chunks;
  uint32_t first_chunk_tokens;
  uint32_t chunk_tokens;  // of the others; the last one may have fewer

  // Workspace, byte offsets.
  uint32_t q_row_bytes;  // int4 activations: [tokens][q_row_bytes], once or once per core
  uint64_t q_offset;
  uint64_t scale_offset;  // float [tokens][kScaleLanes], once or once per core
  uint64_t z_offset;      // float [cores][kRingSlots][slot_tokens][left][right_padded]
  uint64_t acc_offset;    // int32 [cores][kRingSlots][token class][kMaxTileColumns]
};

}  // namespace w4a4::npu
