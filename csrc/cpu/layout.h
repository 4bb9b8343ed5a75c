// SPDX-License-Identifier: Apache-2.0
// How int4 weights lie in memory on the CPU. The one place for this layout; Python asks for it through
// `vllm_w4a4::int4_layout`.
//
// A weight [out, in] is cut into tiles of 16 rows and, within a tile, into blocks of 8 input features:
// packed[tile][block] is 64 bytes. Byte 4 * r + j holds, for row r of the tile, feature j of the block in its low
// nibble and feature j + 4 in its high nibble. One 64-byte load thus gives two vectors of "4 consecutive features for
// each of 16 rows", the operand shape of every int8 dot-product instruction (vpdpbusd, sdot, vpmaddubsw + vpmaddwd).
//
// Nibbles are stored as value + 8, so they unpack to unsigned bytes 0..15. The products are corrected by 8 * sum(q),
// with q the activations, whose sum is known from their quantization. Features beyond the matrix are zero (stored
// 8); rows beyond it hold anything, because what is computed of them is written nowhere.
#pragma once

#include <cstdint>

namespace w4a4 {

inline constexpr int64_t kTileRows = 16;
inline constexpr int64_t kBlockFeatures = 8;
inline constexpr int64_t kBlockBytes = kTileRows * kBlockFeatures / 2;
inline constexpr int32_t kZeroPoint = 8;

// int8 weights have the same tiles and blocks, one byte per value: 64 bytes of features 0..3 of a block, then 64
// of 4..7.
inline constexpr int64_t kInt8BlockBytes = kTileRows * kBlockFeatures;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t tile_count(int64_t out_features) { return ceil_div(out_features, kTileRows); }
constexpr int64_t block_count(int64_t in_features) { return ceil_div(in_features, kBlockFeatures); }

// Bytes of a quantized token, those beyond its features zero: whole rows of the widest instruction's operand.
inline constexpr int64_t kTokenAlignment = 64;
constexpr int64_t token_stride(int64_t in_features) { return ceil_div(in_features, kTokenAlignment) * kTokenAlignment; }

// Quantized activations lie in panels of a few tokens, so that a kernel reads them as one stream: within a panel of T
// tokens, [features / unit][T][unit] bytes, `unit` being what the instruction set takes of a token at a time. Panels
// differ by at most one token.
struct Panels {
  int64_t tokens;
  int64_t count;

  Panels() = default;
  Panels(int64_t tokens, int64_t most) : tokens(tokens), count(ceil_div(tokens, most)) {}
  int64_t begin(int64_t panel) const { return panel * tokens / count; }
  int64_t size(int64_t panel) const { return begin(panel + 1) - begin(panel); }
};

}  // namespace w4a4
