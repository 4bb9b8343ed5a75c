// SPDX-License-Identifier: Apache-2.0
#include "pack.h"

#include "layout.h"

namespace w4a4 {
namespace {

// Byte of (row, feature) in the packed weight; features 4..7 of a block share the bytes of features 0..3.
int64_t byte_index(int64_t row, int64_t feature, int64_t blocks) {
  const int64_t block = (row / kTileRows) * blocks + feature / kBlockFeatures;
  return block * kBlockBytes + (row % kTileRows) * 4 + feature % 4;
}

bool is_high_nibble(int64_t feature) { return feature % kBlockFeatures >= 4; }

}  // namespace

void pack_rows(const int8_t* weight, int64_t rows, int64_t in_features, int64_t first_row, uint8_t* packed) {
  const int64_t blocks = block_count(in_features);
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* source = weight + r * in_features;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t k = block * kBlockFeatures;
      uint8_t* target = packed + byte_index(first_row + r, k, blocks);
      for (int64_t j = 0; j < 4; ++j) {
        const int low = k + j < in_features ? source[k + j] : 0;
        const int high = k + j + 4 < in_features ? source[k + j + 4] : 0;
        target[j] = static_cast<uint8_t>((low + kZeroPoint) | (high + kZeroPoint) << 4);
      }
    }
  }
}

void unpack_rows(const uint8_t* packed, int64_t rows, int64_t in_features, int8_t* weight) {
  const int64_t blocks = block_count(in_features);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < in_features; ++k) {
      const uint8_t byte = packed[byte_index(r, k, blocks)];
      const int nibble = is_high_nibble(k) ? byte >> 4 : byte & 0xF;
      weight[r * in_features + k] = static_cast<int8_t>(nibble - kZeroPoint);
    }
  }
}

void pack_int8_rows(const int8_t* weight, int64_t rows, int64_t in_features, int64_t first_row, int8_t* packed) {
  const int64_t blocks = block_count(in_features);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first_row + r;
    int8_t* target = packed + (row / kTileRows) * blocks * kInt8BlockBytes + (row % kTileRows) * 4;
    for (int64_t k = 0; k < blocks * kBlockFeatures; ++k) {
      const int64_t half_block = k / 4;
      target[half_block * kTileRows * 4 + k % 4] = k < in_features ? weight[r * in_features + k] : int8_t{0};
    }
  }
}

int64_t find_outside_int4(const int8_t* values, int64_t count) {
  // Blocks keep the loop vectorizable; the exact place is looked for only when there is one.
  constexpr int64_t kBlock = 4096;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    unsigned outside = 0;
    for (int64_t i = begin; i < end; ++i) outside |= static_cast<uint8_t>(values[i] + kZeroPoint) & 0xF0u;
    if (outside) {
      int64_t i = begin;
      while ((static_cast<uint8_t>(values[i] + kZeroPoint) & 0xF0u) == 0) ++i;
      return i;
    }
  }
  return -1;
}

}  // namespace w4a4
