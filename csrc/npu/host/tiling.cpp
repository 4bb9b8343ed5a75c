// SPDX-License-Identifier: Apache-2.0
#include "tiling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

namespace w4a4::npu {
namespace {

constexpr int64_t kMaxFactor = 256;      // rows of one A operand of the transform
constexpr int64_t kMaxFeatures = 32768;  // a token's float32 values must fit in UB
constexpr int64_t kWorkspaceAlignment = 512;
constexpr int64_t kMaxReplicatedTokens = 32;
constexpr int64_t kMinPipelinedStages = 4;  // fewer would wait for the latency of each load
constexpr int64_t kMaxChunkRows = 12;
// Of the time. If the path into L0 or out of L0C is busy for longer, the cube waits between its tiles.
constexpr double kMaxFeedShare = 0.9, kMaxStoreShare = 0.75;
constexpr int64_t kMinPrefetchBytes = 40 * 1024;  // of weights, loaded while a stage is multiplied

// Bytes per microsecond of the transfer paths (GiB/s from the platform tables).
constexpr double kGiBPerSecond = 1024.0 * 1024 * 1024 / 1e6;
constexpr double kL0CToGm = 70 * kGiBPerSecond;
constexpr double kL0CToL1 = 128 * kGiBPerSecond;
constexpr double kGmToL1 = 135 * kGiBPerSecond;
constexpr double kHbm = 1.6e6;  // of the device
constexpr double kL1ToL0A = 441 * kGiBPerSecond;
constexpr double kL1ToL0B = 220 * kGiBPerSecond;
constexpr double kGmToUb = 101 * kGiBPerSecond;
constexpr double kCyclesPerMicrosecond = 1800;
constexpr double kTileMicroseconds = 0.05;  // to start a tile; decides between otherwise equal tiles
constexpr double kInt4MacsPerCycle = 16 * 16 * 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

std::string text(int64_t value) { return std::to_string(value); }

Factors factors_of(const LinearShape& shape) {
  return static_cast<Factors>((shape.left > 0 ? 1u : 0u) | (shape.right > 0 ? 2u : 0u));
}

std::string check(const LinearShape& s, uint32_t cores) {
  if (cores == 0 || cores > 64) return "cores: expected 1 to 64, found " + text(cores);
  if (s.tokens < 1 || s.tokens > 1 << 24) return "tokens: expected 1 to 16777216, found " + text(s.tokens);
  if (s.in_features < 8 || s.in_features > kMaxFeatures || s.in_features % 8 != 0) {
    return "in_features: expected a multiple of 8 up to " + text(kMaxFeatures) + ", found " + text(s.in_features);
  }
  // 65535 is the largest stride, in 32-byte blocks, between the rows of weight fractals.
  if (s.out_features < 1 || s.out_features > 65536) {
    return "out_features: expected 1 to 65536, found " + text(s.out_features);
  }
  if (!is_clip_ratio(s.clip_ratio)) return "clip_ratio: expected a value in (0, 1]";
  if (s.left < 0 || s.right < 0) return "left_trans, right_trans: a size is negative";
  const int64_t left = s.left > 0 ? s.left : (s.right > 0 ? s.in_features / s.right : 1);
  const int64_t right = s.right > 0 ? s.right : s.in_features / left;
  if (left * right != s.in_features) {
    return "left_trans, right_trans: sizes " + text(s.left) + " and " + text(s.right) + " do not multiply to the " +
           text(s.in_features) + " input features";
  }
  if (factors_of(s) != Factors::kNone) {
    if (left < 2 || left > kMaxFactor || right < 8 || right > kMaxFactor || right % 8 != 0) {
      return "left_trans, right_trans: expected a left size of 2 to 256 and a right size of 8 to 256 that is a " +
             std::string("multiple of 8, found ") + text(left) + " and " + text(right);
    }
  }
  if (s.groups < 1 || s.in_features % s.groups != 0 ||
      (s.groups > 1 && s.in_features / s.groups % kInt4FractalK != 0)) {
    return "weight_scale: " + text(s.groups) + " groups do not divide " + text(s.in_features) +
           " input features into multiples of 64";
  }
  return "";
}

// Divides the transform of a linear with at least one factor so that an A operand has at most 256 rows and the results
// of one pass over `block_columns` are at most `sums` float32 sums.
void split_transform(const LinearShape& shape, int64_t sums, TilingData& data) {
  data.left = static_cast<uint32_t>(shape.left > 0    ? shape.left
                                    : shape.right > 0 ? shape.in_features / shape.right
                                                      : 1);
  data.right = static_cast<uint32_t>(shape.in_features / data.left);
  data.left_padded = static_cast<uint32_t>(round_up(data.left, kFractalRows));
  data.right_padded = static_cast<uint32_t>(round_up(data.right, kFractalRows));
  data.pass_tokens = data.slot_tokens = 1;
  if (factors_of(shape) == Factors::kNone) return;

  // Rows of several tokens form one operand only if there are no padding rows between them.
  int64_t pass = 1;
  if (data.left % kFractalRows == 0) {
    pass = std::min(kMaxFactor / data.left_padded, sums / (data.left_padded * data.right_padded));
    pass = std::clamp<int64_t>(pass, 1, 8);
    if (pass > 1) pass -= pass % 2;  // the two AIVs of a core share a slot's tokens
  }
  data.pass_tokens = static_cast<uint32_t>(pass);
  data.slot_tokens = static_cast<uint32_t>(std::max<int64_t>(pass, 2));
  const int64_t rows = pass * data.left_padded;
  const int64_t most = sums / rows / kFractalRows * kFractalRows;
  const int64_t blocks = ceil_div(data.right_padded, most);
  data.block_columns = static_cast<uint32_t>(round_up(ceil_div(data.right_padded, blocks), kFractalRows));
}

constexpr int64_t kL1Bytes = 512 * 1024;
constexpr int64_t kL1Rows = kL1Bytes / (kGemmStepK / 2);  // rows or columns of one step that L1 holds

double load_microseconds(int64_t rows, int64_t in_features) { return rows * in_features / 2.0 / kGmToL1; }
// Weights that only one row of tiles reads come from the HBM, at a core's share of its rate; others mostly from the L2.
double weights_microseconds(int64_t columns, int64_t in_features, int64_t row_tiles, uint32_t cores) {
  const double rate = row_tiles == 1 ? std::min(kGmToL1, kHbm / cores) : kGmToL1;
  return columns * in_features / 2.0 / rate;
}
double multiply_microseconds(int64_t rows, int64_t columns, int64_t in_features) {
  return rows * columns * in_features / kInt4MacsPerCycle / kCyclesPerMicrosecond;
}

// Rows of a tile if none has more than `most`: 129 tokens make two tiles of 80 and 49 rows, not of 128 and 1.
int64_t even_rows(int64_t tokens, int64_t most) {
  return round_up(ceil_div(tokens, ceil_div(tokens, most)), kFractalRows);
}

// The time of the device, given that of a core: the weights come from the HBM once. The hundredth decides between grids
// that all wait for the HBM.
double device_microseconds(const LinearShape& shape, double core) {
  return std::max(core, shape.in_features * shape.out_features / 2.0 / kHbm) + 0.01 * core;
}

struct Grid {
  int64_t rows = 0, columns = 0;  // of a tile
  bool resident = false;
  double microseconds = INFINITY;
  int64_t depth = kGemmStepK;  // of a stage
  int64_t first_rows = 0;      // rows of tiles in the first chunk; 0: in the only one
  int64_t chunk_rows = 0;      // in the others
};

// The tile width that balances best if activations and weights are streamed together.
Grid streaming_grid(const LinearShape& shape, uint32_t cores, int64_t most_rows) {
  Grid best;
  const int64_t rows = even_rows(shape.tokens, most_rows), row_tiles = ceil_div(shape.tokens, rows);
  for (int64_t columns = kMaxTileColumns; columns >= kFractalRows; columns -= kFractalRows) {
    // Half of a tile's sums leave L0C while the other half is multiplied; part of the rest delays the next tile.
    const double store = 0.25 * rows * columns * 4.0 / kL0CToGm;
    const double load =
        load_microseconds(rows, shape.in_features) + weights_microseconds(columns, shape.in_features, row_tiles, cores);
    const double tile =
        kTileMicroseconds + std::max(load, multiply_microseconds(rows, columns, shape.in_features) + store);
    const double time = ceil_div(row_tiles * ceil_div(shape.out_features, columns), cores) * tile;
    const double device = device_microseconds(shape, time);
    if (device < best.microseconds) best = {rows, columns, false, device};
  }
  return best;
}

// The same with the activations of a row of tiles resident, if L1 has room for them and `stages` of weights. There must
// be at least as many steps as stages: the kernel reuses a step's slot when its stage is reused.
Grid resident_grid(const LinearShape& shape, uint32_t cores, int64_t most_rows, int64_t most_columns, int64_t stages) {
  Grid best;
  const int64_t steps = ceil_div(shape.in_features, kGemmStepK);
  if (steps < stages) return best;
  for (int64_t columns = most_columns; columns >= kFractalRows; columns -= kFractalRows) {
    const int64_t fits = (kL1Rows - stages * columns) / steps / kFractalRows * kFractalRows;
    if (fits <= 0) continue;
    const int64_t rows = even_rows(shape.tokens, std::min(most_rows, fits));
    if (shape.tokens <= most_rows && rows < shape.tokens) continue;  // one row of tiles reads each weight once
    const int64_t row_tiles = ceil_div(shape.tokens, rows), column_tiles = ceil_div(shape.out_features, columns);
    const double feed = shape.in_features / 2.0 * (rows / kL1ToL0A + columns / kL1ToL0B);
    const double tile =
        kTileMicroseconds + std::max({weights_microseconds(columns, shape.in_features, row_tiles, cores), feed,
                                      multiply_microseconds(rows, columns, shape.in_features)});
    const int64_t tiles = ceil_div(row_tiles * column_tiles, cores);
    const double time = tiles * tile + ceil_div(tiles, column_tiles) * load_microseconds(rows, shape.in_features);
    const double device = device_microseconds(shape, time);
    if (device < best.microseconds) best = {rows, columns, true, device};
  }
  return best;
}

// Bytes of L1 that the transform uses, with two passes of tokens in it.
int64_t transform_l1_bytes(const TilingData& data, Factors factors) {
  const bool has_left = factors != Factors::kRight, has_right = factors != Factors::kLeft;
  const int64_t rows = int64_t{data.pass_tokens} * data.left_padded;
  const int64_t left = has_left ? int64_t{data.left_padded} * data.left_padded : 0;
  const int64_t right = has_right ? int64_t{data.right_padded} * data.right_padded : 0;
  const int64_t products = has_left && has_right ? 2 * rows * data.block_columns : 0;
  return 2 * (left + right + products + 2 * rows * data.right_padded);
}

// How long the busiest core works on the resident tiles of some rows of tiles: on loads or products, on operands into
// L0 (feed), and on sums out of L0C (store), in microseconds.
struct ChunkTime {
  double multiply = 0, feed = 0, store = 0;
};

ChunkTime chunk_time(const LinearShape& shape, int64_t rows, int64_t columns, int64_t row_tiles, uint32_t cores) {
  const int64_t column_tiles = ceil_div(shape.out_features, columns), tiles = row_tiles * column_tiles;
  const double weights = weights_microseconds(columns, shape.in_features, 2, cores);
  const double products = multiply_microseconds(rows, columns, shape.in_features);
  const double tile = std::max(weights, products);
  // The first tile of a row loads its activations too.
  const double opening = std::max(weights + load_microseconds(rows, shape.in_features), products);
  ChunkTime time;
  for (int64_t core = 0; core < cores; ++core) {
    const int64_t first = core * tiles / cores, end = (core + 1) * tiles / cores;
    if (first == end) continue;
    const int64_t openings = (end - 1) / column_tiles - first / column_tiles + 1;
    time.multiply = std::max(time.multiply, (end - first) * (kTileMicroseconds + tile) + openings * (opening - tile));
  }
  const int64_t most = ceil_div(tiles, cores);
  time.feed = most * shape.in_features / 2.0 * (rows / kL1ToL0A + columns / kL1ToL0B);
  time.store = most * rows * columns * 4.0 / kL0CToGm;
  return time;
}

// How long one token's operands take into L0.
double transform_feed_microseconds(const TilingData& data, Factors factors) {
  const double blocks = static_cast<double>(ceil_div(data.right_padded, data.block_columns));
  const double token = 2.0 * data.left_padded * data.right_padded;
  double time = 0;
  if (factors != Factors::kLeft) {
    time += blocks * token / kL1ToL0A + 2.0 * data.right_padded * data.right_padded / data.pass_tokens / kL1ToL0B;
  }
  if (factors != Factors::kRight) {
    time += blocks * 2.0 * data.left_padded * data.left_padded / kL1ToL0A + token / kL1ToL0B;
  }
  return time;
}

// The best division of resident tiles of `rows` x `columns` into chunks, each multiplied while the next is transformed.
void consider_chunks(const LinearShape& shape, uint32_t cores, const TilingData& data, Grid grid, Grid& best) {
  const int64_t row_tiles = ceil_div(shape.tokens, grid.rows);
  const double feed = transform_feed_microseconds(data, factors_of(shape));
  const auto tokens = [&](int64_t rows_of_tiles) { return ceil_div(rows_of_tiles * grid.rows, cores); };
  const auto transform = [&](int64_t rows_of_tiles) {
    return transform_microseconds(shape) * tokens(rows_of_tiles) + kBarrierMicroseconds;
  };
  std::array<ChunkTime, kMaxChunkRows + 1> times;
  for (int64_t i = 1; i <= std::min(kMaxChunkRows, row_tiles); ++i) {
    times[i] = chunk_time(shape, grid.rows, grid.columns, i, cores);
  }
  const auto overlapped = [&](int64_t rows_of_tiles, int64_t next) {
    const ChunkTime& time = times[rows_of_tiles];
    const double load = load_microseconds(tokens(next), shape.in_features) * 4;  // 16 bits instead of 4
    return std::max({time.multiply + load, (time.feed + tokens(next) * feed) / kMaxFeedShare,
                     (time.store + transform(next)) / kMaxStoreShare});
  };
  for (grid.first_rows = 1; grid.first_rows <= std::min(kMaxChunkRows, row_tiles - 1); ++grid.first_rows) {
    const int64_t rest = row_tiles - grid.first_rows;
    for (grid.chunk_rows = 1; grid.chunk_rows <= std::min(kMaxChunkRows, rest); ++grid.chunk_rows) {
      const int64_t chunks = ceil_div(rest, grid.chunk_rows), last = rest - (chunks - 1) * grid.chunk_rows;
      grid.microseconds = device_microseconds(
          shape, transform(grid.first_rows) + overlapped(grid.first_rows, grid.chunk_rows) +
                     (chunks - 1) * overlapped(grid.chunk_rows, grid.chunk_rows) + times[last].multiply);
      if (grid.microseconds < best.microseconds) best = grid;
    }
  }
}

// Large resident tiles that leave room in L1 and L0C for the transform of the next chunk of tokens. `data` has the
// transform divided for that.
Grid pipelined_grid(const LinearShape& shape, uint32_t cores, const TilingData& data) {
  Grid best;
  const int64_t room = kL1Bytes - transform_l1_bytes(data, factors_of(shape));
  for (int64_t columns = kResidentTileColumns; columns > kResidentTileColumns / 2; columns -= kFractalRows) {
    int64_t tried = 0;
    for (const int64_t depth : {1024, 512, 256}) {
      const int64_t steps = ceil_div(shape.in_features, depth), stage = columns * depth / 2;
      if (steps < kPipelinedStages || (kMinPipelinedStages - 1) * stage < kMinPrefetchBytes) continue;
      const int64_t fits = (room - kMinPipelinedStages * stage) / (steps * depth / 2);
      const int64_t rows = std::min({int64_t{128}, fits, kPipelinedTileSums / columns}) / kFractalRows * kFractalRows;
      // Shorter stages only if they allow more rows. The kernel pads a tile of one row in the first stage only.
      if (rows <= std::max<int64_t>(tried, 64) || shape.tokens % rows == 1) continue;
      tried = rows;
      consider_chunks(shape, cores, data, {rows, columns, true, INFINITY, depth}, best);
    }
  }
  return best;
}

// Divides the tokens into a chunk of `first` and chunks of `others`; first == 0: into one chunk.
void split_chunks(int64_t first, int64_t others, TilingData& data) {
  data.chunks = 1;
  data.first_chunk_tokens = data.chunk_tokens = data.tokens;
  if (first == 0) return;
  data.chunks += static_cast<uint32_t>(ceil_div(data.tokens - first, others));
  data.first_chunk_tokens = static_cast<uint32_t>(first);
  data.chunk_tokens = static_cast<uint32_t>(others);
}

void tile_gemm(const LinearShape& shape, uint32_t cores, Pipelining pipelining, Tiling& tiling) {
  tiling.token_class = shape.tokens <= 16   ? TokenClass::kRows16
                       : shape.tokens <= 32 ? TokenClass::kRows32
                       : shape.tokens <= 64 ? TokenClass::kRows64
                                            : TokenClass::kRows128;
  const bool is_tall = tiling.token_class == TokenClass::kRows128;
  const int64_t most_rows = static_cast<int64_t>(tiling.token_class);
  const Grid streaming = streaming_grid(shape, cores, most_rows);
  // Large tiles are stored while the next one is multiplied, so each has half of L0C; small ones need a deep pipeline.
  const Grid resident = is_tall ? resident_grid(shape, cores, most_rows, kResidentTileColumns, 2)
                                : resident_grid(shape, cores, most_rows, kMaxTileColumns, 3);
  Grid grid = resident.microseconds < streaming.microseconds ? resident : streaming;
  TilingData& data = tiling.data;
  if (is_tall && tiling.factors != Factors::kNone && shape.groups == 1 && shape.in_features <= kPipelinedMaxFeatures) {
    TilingData small = data;
    split_transform(shape, kPipelinedTransformSums, small);
    const Grid pipelined = pipelined_grid(shape, cores, small);
    const double before = transform_microseconds(shape) * ceil_div(shape.tokens, cores) + kBarrierMicroseconds;
    const double best = pipelining == Pipelining::kAlways ? INFINITY : grid.microseconds + before;
    if (pipelined.microseconds < best) {
      data = small;
      grid = pipelined;
    }
  }
  if (pipelining == Pipelining::kAlways && grid.first_rows == 0) {
    tiling.error = "the transform of the next chunk of tokens does not fit between the tiles of this one";
    return;
  }
  data.tile_rows = static_cast<uint32_t>(grid.rows);
  data.tile_columns = static_cast<uint32_t>(grid.columns);
  data.step_depth = static_cast<uint32_t>(grid.depth);
  data.row_tiles = static_cast<uint32_t>(ceil_div(shape.tokens, grid.rows));
  data.column_tiles = static_cast<uint32_t>(ceil_div(shape.out_features, grid.columns));
  data.resident = grid.resident ? 1 : 0;
  split_chunks(grid.first_rows * grid.rows, grid.chunk_rows * grid.rows, data);
}

void lay_out_workspace(uint32_t cores, Tiling& tiling) {
  TilingData& data = tiling.data;
  uint64_t end = 0;
  const auto take = [&end](uint64_t bytes) {
    const uint64_t begin = end;
    end = static_cast<uint64_t>(round_up(static_cast<int64_t>(end + bytes), kWorkspaceAlignment));
    return begin;
  };
  const uint64_t copies = data.replicated ? cores : 1;
  data.q_row_bytes = static_cast<uint32_t>(round_up(data.in_features, kInt4FractalK) / 2);
  data.q_offset = take(copies * data.tokens * data.q_row_bytes);
  data.scale_offset = take(copies * data.tokens * kBlockBytes);
  const uint64_t z_slot = uint64_t{data.slot_tokens} * data.left * data.right_padded * sizeof(float);
  data.z_offset = take(tiling.factors == Factors::kNone ? 0 : cores * kRingSlots * z_slot);
  data.acc_offset =
      take(uint64_t{cores} * kRingSlots * static_cast<uint32_t>(tiling.token_class) * kMaxTileColumns * 4);
  tiling.workspace_bytes = end;
}

}  // namespace

double transform_microseconds(const LinearShape& shape) {
  const double features = static_cast<double>(shape.in_features);
  if (factors_of(shape) == Factors::kNone) return features * 2 / kGmToUb / 2;
  // It is bound by the path out of L0C: the result in float32, and before it X R in 16 bits.
  double time = features * sizeof(float) / kL0CToGm;
  if (factors_of(shape) == Factors::kBoth) time += features * 2 / kL0CToL1;
  return time;
}

Tiling make_tiling(const LinearShape& shape, uint32_t cores, Pipelining pipelining) {
  Tiling tiling;
  tiling.error = check(shape, cores);
  if (!tiling.ok()) return tiling;
  TilingData& data = tiling.data;
  tiling.cores = cores;
  tiling.factors = factors_of(shape);
  data.tokens = static_cast<uint32_t>(shape.tokens);
  data.in_features = static_cast<uint32_t>(shape.in_features);
  data.out_features = static_cast<uint32_t>(shape.out_features);
  data.groups = static_cast<uint32_t>(shape.groups);
  data.group_size = static_cast<uint32_t>(shape.in_features / shape.groups);
  data.has_bias = shape.has_bias ? 1 : 0;
  set_clip_ratio(shape.clip_ratio, data);

  split_transform(shape, kTransformSums, data);
  const double all = transform_microseconds(shape) * shape.tokens;
  const double share = transform_microseconds(shape) * ceil_div(shape.tokens, cores) + kBarrierMicroseconds;
  data.replicated = shape.tokens <= kMaxReplicatedTokens && all <= share ? 1 : 0;
  tile_gemm(shape, cores, pipelining, tiling);
  if (tiling.ok()) lay_out_workspace(cores, tiling);
  return tiling;
}

Tiling share_activations(const Tiling& tiling) {
  Tiling shared = tiling;
  shared.data.replicated = 0;
  split_chunks(0, 0, shared.data);
  lay_out_workspace(shared.cores, shared);
  return shared;
}

}  // namespace w4a4::npu
