// SPDX-License-Identifier: Apache-2.0
#include "pack.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>

#include "layout.h"

namespace w4a4 {
namespace {

static_assert(std::endian::native == std::endian::little, "blocks are read as words");

// Values that a thread packs at least.
constexpr int64_t kPackGrain = 1 << 16;

// Blocks of a row that are packed before the next row: a cache line of the source, and of 16 rows half a kilobyte of
// the target or a whole one, which stay in the first-level cache.
constexpr int64_t kBlocksAtOnce = 8;

// Byte of (row, feature) in the packed weight; features 4..7 of a block share the bytes of features 0..3.
int64_t byte_index(int64_t row, int64_t feature, int64_t blocks) {
  const int64_t block = (row / kTileRows) * blocks + feature / kBlockFeatures;
  return block * kBlockBytes + (row % kTileRows) * 4 + feature % 4;
}

bool is_high_nibble(int64_t feature) { return feature % kBlockFeatures >= 4; }

// What a row contributes to one block. `values` are its 8 features, byte by byte.
struct Int4Block {
  static constexpr int64_t kBytes = kBlockBytes;
  // Not 0 if a value is outside [-8, 7], in which all bits from the third on are equal.
  static uint64_t outside(uint64_t values) { return (values ^ values << 1) & 0xF0F0F0F0F0F0F0F0; }
  static void store(uint64_t values, char* target) {
    // For v in [-8, 7], v + 8 is the low nibble of v with its sign bit flipped.
    const uint64_t nibbles = (values & 0x0F0F0F0F0F0F0F0F) ^ 0x0808080808080808;
    const auto bytes = static_cast<uint32_t>(nibbles | nibbles >> 28);
    std::memcpy(target, &bytes, sizeof bytes);
  }
};

struct Int8Block {
  static constexpr int64_t kBytes = kInt8BlockBytes;
  static uint64_t outside(uint64_t) { return 0; }
  static void store(uint64_t values, char* target) {
    std::memcpy(target, &values, 4);
    const uint64_t second = values >> 32;
    std::memcpy(target + kInt8BlockBytes / 2, &second, 4);
  }
};

// Packs `rows` rows that lie in one tile; `target` is where the first of them begins in the tile. Returns not 0 if a
// value is outside the range.
template <typename Block>
uint64_t pack_in_tile(const int8_t* weight, int64_t rows, int64_t in_features, char* target) {
  const int64_t whole = in_features / kBlockFeatures, rest = in_features % kBlockFeatures;
  uint64_t outside = 0;
  for (int64_t first = 0; first < whole; first += kBlocksAtOnce) {
    const int64_t last = std::min(first + kBlocksAtOnce, whole);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t block = first; block < last; ++block) {
        uint64_t values;
        std::memcpy(&values, weight + r * in_features + block * kBlockFeatures, sizeof values);
        outside |= Block::outside(values);
        Block::store(values, target + block * Block::kBytes + r * 4);
      }
    }
  }
  for (int64_t r = 0; rest > 0 && r < rows; ++r) {
    uint64_t values = 0;  // features beyond the weight are zero
    std::memcpy(&values, weight + r * in_features + whole * kBlockFeatures, rest);
    outside |= Block::outside(values);
    Block::store(values, target + whole * Block::kBytes + r * 4);
  }
  return outside;
}

// Whether all values are in the range.
template <typename Block>
bool pack(const int8_t* weight, int64_t rows, int64_t in_features, int64_t first_row, void* packed, const Pool& pool) {
  const int64_t tile_bytes = block_count(in_features) * Block::kBytes;
  const int64_t first_tile = first_row / kTileRows, tiles = tile_count(first_row + rows) - first_tile;
  const int64_t grain = ceil_div(kPackGrain, kTileRows * std::max<int64_t>(1, in_features));
  std::atomic<bool> is_right = true;
  pool.parallel_for(tiles, grain, [&](int64_t begin, int64_t end) {
    uint64_t outside = 0;
    for (int64_t tile = first_tile + begin; tile < first_tile + end; ++tile) {
      const int64_t first = std::max(first_row, tile * kTileRows);
      const int64_t last = std::min(first_row + rows, (tile + 1) * kTileRows);
      char* target = static_cast<char*>(packed) + tile * tile_bytes + first % kTileRows * 4;
      outside |= pack_in_tile<Block>(weight + (first - first_row) * in_features, last - first, in_features, target);
    }
    if (outside) is_right = false;
  });
  return is_right;
}

}  // namespace

bool pack_rows(const int8_t* weight, int64_t rows, int64_t in_features, int64_t first_row, uint8_t* packed,
               const Pool& pool) {
  return pack<Int4Block>(weight, rows, in_features, first_row, packed, pool);
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

void pack_int8_rows(const int8_t* weight, int64_t rows, int64_t in_features, int64_t first_row, int8_t* packed,
                    const Pool& pool) {
  pack<Int8Block>(weight, rows, in_features, first_row, packed, pool);
}

int64_t find_outside_int4(const int8_t* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < -8 || values[i] > 7) return i;
  }
  return -1;
}

}  // namespace w4a4
