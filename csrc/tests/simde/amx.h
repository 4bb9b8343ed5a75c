// SPDX-License-Identifier: Apache-2.0
// The tile intrinsics that the kernels use, in plain C++ after the instructions' descriptions (Intel 64 and IA-32
// Architectures Software Developer's Manual, volume 2). What the processor would refuse ends the program: tiles used
// before they are configured or after their release, shapes that do not fit together.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

constexpr int kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64;

struct State {
  bool is_configured = false;
  int rows[kTiles] = {}, row_bytes[kTiles] = {};
  uint8_t data[kTiles][kMaxRows][kMaxRowBytes] = {};
};

inline State& state() {
  thread_local State of_this_thread;
  return of_this_thread;
}

inline void require(bool is_right, const char* what) {
  if (is_right) return;
  std::fprintf(stderr, "AMX emulation: %s\n", what);
  std::abort();
}

inline void load_config(const void* memory) {
  uint8_t config[64];
  std::memcpy(config, memory, sizeof config);
  require(config[0] == 1, "the palette is not 1");
  for (int i = 1; i < 16; ++i) require(config[i] == 0, "start row and reserved bytes are not 0");
  State fresh;
  fresh.is_configured = true;
  for (int tile = 0; tile < 16; ++tile) {
    const int row_bytes = config[16 + 2 * tile] | config[17 + 2 * tile] << 8, rows = config[48 + tile];
    if (tile >= kTiles) {
      require(row_bytes == 0 && rows == 0, "a tile beyond the eighth is configured");
      continue;
    }
    require(row_bytes <= kMaxRowBytes && rows <= kMaxRows, "a tile is larger than 16 rows of 64 bytes");
    require((row_bytes == 0) == (rows == 0), "a tile has rows or bytes alone");
    fresh.row_bytes[tile] = row_bytes;
    fresh.rows[tile] = rows;
  }
  state() = fresh;
}

inline void release() { state() = State{}; }

inline State& used(int tile) {
  State& s = state();
  require(s.is_configured && tile >= 0 && tile < kTiles && s.rows[tile] > 0, "a tile is used that is not configured");
  return s;
}

inline void zero(int tile) { std::memset(used(tile).data[tile], 0, sizeof State{}.data[tile]); }

inline void load(int tile, const void* base, int64_t stride) {
  State& s = used(tile);
  zero(tile);
  for (int r = 0; r < s.rows[tile]; ++r) {
    std::memcpy(s.data[tile][r], static_cast<const char*>(base) + r * stride, s.row_bytes[tile]);
  }
}

inline void store(int tile, void* base, int64_t stride) {
  const State& s = used(tile);
  for (int r = 0; r < s.rows[tile]; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, s.data[tile][r], s.row_bytes[tile]);
  }
}

// sum[m][n] += the products of four signed bytes of a[m] and four unsigned bytes of b[k], modulo 2^32.
inline void multiply_signed_unsigned(int sum, int a, int b) {
  State& s = used(sum);
  used(a), used(b);
  require(sum != a && sum != b && a != b, "operands of a product are the same tile");
  require(s.rows[sum] == s.rows[a] && s.row_bytes[sum] == s.row_bytes[b] && s.row_bytes[a] == 4 * s.rows[b],
          "the operands of a product do not fit together");
  for (int m = 0; m < s.rows[sum]; ++m) {
    for (int n = 0; n < s.row_bytes[sum] / 4; ++n) {
      uint32_t total;
      std::memcpy(&total, &s.data[sum][m][4 * n], sizeof total);
      for (int k = 0; k < s.row_bytes[a]; ++k) {
        const auto signed_byte = static_cast<int8_t>(s.data[a][m][k]);
        total += static_cast<uint32_t>(signed_byte * s.data[b][k / 4][4 * n + k % 4]);
      }
      std::memcpy(&s.data[sum][m][4 * n], &total, sizeof total);
    }
  }
}

}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig amx_emulation::load_config
#define _tile_release amx_emulation::release
#define _tile_zero amx_emulation::zero
#define _tile_loadd amx_emulation::load
#define _tile_stored amx_emulation::store
#define _tile_dpbsud amx_emulation::multiply_signed_unsigned
