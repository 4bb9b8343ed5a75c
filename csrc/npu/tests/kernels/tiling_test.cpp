// SPDX-License-Identifier: Apache-2.0
// The tiling of every linear of the models: within the hardware's limits, complete, balanced; and the decisions
// themselves for Qwen3-32B.
#include "../../host/tiling.h"

#include <algorithm>
#include <string>
#include <vector>

#include "../../host/tiling_cache.h"
#include "check.h"
#include "models.h"

using namespace w4a4::npu;

namespace {

constexpr uint64_t kUb = 192 * 1024, kL1 = 512 * 1024, kL0 = 64 * 1024, kL0C = 128 * 1024;

// `l1`: bytes of L1 that the GEMM uses.
void check_pipelined(const Tiling& t, uint64_t l1, const std::string& what) {
  const TilingData& d = t.data;
  check(d.resident && !d.replicated && d.groups == 1 && t.token_class == TokenClass::kRows128, what + ": chunks");
  check(d.first_chunk_tokens % d.tile_rows == 0 && d.chunk_tokens % d.tile_rows == 0, what + ": chunks of whole tiles");
  const uint64_t before_last = d.first_chunk_tokens + uint64_t{d.chunks - 2} * d.chunk_tokens;
  check(before_last < d.tokens && d.tokens <= before_last + d.chunk_tokens, what + ": chunks cover the tokens");
  check(d.tokens % d.tile_rows != 1, what + ": no tile of one row");
  check(uint64_t{d.tile_rows} * d.tile_columns <= kPipelinedTileSums, what + ": a tile in L0C");
  check(2 * 4 * (kPipelinedTileSums + kPipelinedTransformSums) <= kL0C, what + ": L0C");
  check(uint64_t{d.tile_rows} * kPipelinedDepth / 2 <= kL0 / 4, what + ": L0 of the GEMM");
  const bool has_left = t.factors != Factors::kRight, has_right = t.factors != Factors::kLeft;
  const uint64_t rows = d.pass_tokens * d.left_padded;
  const uint64_t left = has_left ? uint64_t{d.left_padded} * d.left_padded : 0;
  const uint64_t right = has_right ? uint64_t{d.right_padded} * d.right_padded : 0;
  const uint64_t products = has_left && has_right ? 2 * rows * d.block_columns : 0;
  check(l1 + 2 * (left + right + products + 2 * rows * d.right_padded) <= kL1, what + ": L1 of both");
  check(d.in_features <= kPipelinedMaxFeatures, what + ": a token in UB together with the epilogue");
}

void check_limits(const Tiling& t, const std::string& what) {
  const TilingData& d = t.data;
  const uint32_t most_rows = static_cast<uint32_t>(t.token_class);
  check(d.tile_rows % 16 == 0 && d.tile_rows > 0 && d.tile_rows <= most_rows, what + ": rows of a tile");
  check(d.tile_columns % 16 == 0 && d.tile_columns > 0 && d.tile_columns <= kMaxTileColumns, what + ": columns");
  check(d.row_tiles == (d.tokens + d.tile_rows - 1) / d.tile_rows, what + ": row tiles cover the tokens");
  check(uint64_t{d.column_tiles} * d.tile_columns >= d.out_features, what + ": column tiles cover the outputs");
  check((uint64_t{d.column_tiles} - 1) * d.tile_columns < d.out_features, what + ": no empty tile");
  check(most_rows < 128 ? d.row_tiles == 1 : d.tokens > 64, what + ": token class");
  const bool is_pipelined = d.chunks > 1;
  const uint64_t steps = (d.in_features + d.step_depth - 1) / d.step_depth;
  const uint64_t stages = is_pipelined ? 4 : most_rows == 128 ? 2 : 3;
  const uint64_t l1 =
      (d.resident ? steps * d.tile_rows + stages * d.tile_columns : stages * (d.tile_rows + d.tile_columns)) *
      d.step_depth / 2;
  check(l1 <= kL1, what + ": L1 of the GEMM");
  check(is_pipelined || d.step_depth == kGemmStepK, what + ": depth of a stage");
  check(!d.resident || most_rows < 128 || d.tile_columns <= kResidentTileColumns, what + ": columns, resident");
  check(!d.resident || steps >= stages, what + ": no fewer steps than stages");
  check(d.q_row_bytes % 32 == 0 && d.q_row_bytes * 2 >= d.in_features, what + ": row of int4 activations");
  check(d.q_row_bytes <= 65535, what + ": stride of the ND to NZ copy");
  check((d.out_features + 15) / 16 * 16 <= 65536, what + ": stride between weight fractals");
  check(d.in_features * 4 + 32 * 1024 + d.in_features / 2 <= kUb, what + ": a token in UB");
  if (t.factors == Factors::kNone) return;

  const uint32_t rows = d.pass_tokens * d.left_padded;
  check(d.left * d.right == d.in_features, what + ": factors");
  check(rows <= 256 && (d.pass_tokens == 1 || d.left % 16 == 0), what + ": rows of a pass");
  check(d.slot_tokens % d.pass_tokens == 0 && d.slot_tokens >= 2, what + ": tokens of a slot");
  check(d.block_columns % 16 == 0 && d.block_columns <= d.right_padded, what + ": columns of a pass");
  const uint64_t sums = is_pipelined ? kPipelinedTransformSums : kTransformSums;
  check(rows * d.block_columns <= sums && 3 * 4 * kTransformSums <= kL0C, what + ": L0C of the transform");
  // The shortest depth step, 16, must fit a double-buffered L0, or its half.
  check(std::max(rows, d.block_columns) * 16 * 2 <= kL0 / (is_pipelined ? 4 : 2), what + ": L0 of the transform");
  const uint64_t factors = 2 * (uint64_t{d.left_padded} * d.left_padded + uint64_t{d.right_padded} * d.right_padded);
  const uint64_t tokens = 2 * 2 * uint64_t{rows} * (d.right_padded + d.block_columns);
  check(factors + tokens <= kL1, what + ": L1 of the transform");
  if (is_pipelined) check_pipelined(t, l1, what);
}

void check_workspace(const Tiling& t, const std::string& what) {
  const TilingData& d = t.data;
  const uint64_t copies = d.replicated ? t.cores : 1;
  check(d.q_offset + copies * d.tokens * d.q_row_bytes <= d.scale_offset, what + ": workspace of q");
  check(d.scale_offset + copies * d.tokens * 32 <= d.z_offset, what + ": workspace of scales");
  const uint64_t z =
      t.factors == Factors::kNone ? 0 : uint64_t{t.cores} * 2 * d.slot_tokens * d.left * d.right_padded * sizeof(float);
  check(d.z_offset + z <= d.acc_offset, what + ": workspace of z");
  const uint64_t acc = uint64_t{t.cores} * 2 * static_cast<uint32_t>(t.token_class) * 256 * 4;
  check(d.acc_offset + acc <= t.workspace_bytes, what + ": workspace of accumulators");
  for (const uint64_t offset : {d.q_offset, d.scale_offset, d.z_offset, d.acc_offset}) {
    check(offset % 512 == 0, what + ": alignment");
  }
}

// The busiest core's columns, in percent of an even share.
int64_t imbalance(const Tiling& t) {
  const TilingData& d = t.data;
  const int64_t tiles = int64_t{d.row_tiles} * d.column_tiles;
  const int64_t busiest = (tiles + t.cores - 1) / t.cores * d.tile_columns * d.tile_rows;
  const int64_t all = (d.out_features + 15) / 16 * 16 * int64_t{d.row_tiles} * d.tile_rows;
  return 100 * busiest * t.cores / all;
}

void test_models() {
  for (const Model& model : models()) {
    for (const int64_t tp : {1, 2, 4, 8}) {
      for (const Linear& linear : linears(model, tp)) {
        for (const uint32_t cores : {20u, 24u}) {
          for (const int64_t tokens : {1, 2, 16, 17, 32, 33, 64, 100, 128, 129, 300, 1024, 4096, 32769}) {
            const std::string what = linear.name + " " + std::to_string(tokens) + " tokens " + std::to_string(cores);
            const Tiling t = make_tiling({tokens, linear.in, linear.out, linear.left, linear.right}, cores);
            if (!check(t.ok(), what + ": " + t.error)) continue;
            check_limits(t, what);
            check_workspace(t, what);
          }
        }
      }
    }
    // Row-parallel linears under tensor parallelism: the transform alone.
    const auto [il, ir] = factor_sizes(model.intermediate);
    for (const LinearShape& shape : {LinearShape{300, model.intermediate, 16, il, ir},
                                     LinearShape{300, model.heads * model.head_dim, 16, model.heads, 0}}) {
      const Tiling t = make_tiling(shape, 24);
      const std::string what = std::string(model.name) + " transform of " + std::to_string(shape.in_features);
      if (check(t.ok(), what + ": " + t.error)) check_limits(t, what);
    }
  }
}

void test_balance() {
  // In none of the Qwen3-32B linears does a core have more than this, in percent of an even share.
  struct Case {
    int64_t tokens, in, out, left, right, percent;
  };
  for (const Case& c :
       {Case{1, 5120, 10240, 64, 80, 105}, Case{1, 8192, 5120, 64, 0, 105}, Case{1, 5120, 51200, 64, 80, 105},
        Case{1, 25600, 5120, 160, 160, 105}, Case{64, 5120, 51200, 64, 80, 110}, Case{1024, 5120, 10240, 64, 80, 112},
        Case{4096, 5120, 10240, 64, 80, 110}, Case{4096, 5120, 51200, 64, 80, 105},
        Case{4096, 25600, 5120, 160, 160, 110}}) {
    const Tiling t = make_tiling({c.tokens, c.in, c.out, c.left, c.right}, 24);
    const int64_t found = imbalance(t);
    check(found <= c.percent, std::to_string(c.in) + " x " + std::to_string(c.out) + ", " + std::to_string(c.tokens) +
                                  " tokens: the busiest core has " + std::to_string(found) + " % of an even share");
  }
}

void test_decisions() {
  const Tiling one = make_tiling({1, 5120, 10240, 64, 80}, 24);
  check(one.data.replicated == 1 && one.token_class == TokenClass::kRows16, "one token: every core transforms it");
  check(one.data.pass_tokens == 2 && one.data.block_columns == 80, "64 x 80: two tokens at once, whole rows");
  const Tiling many = make_tiling({64, 5120, 10240, 64, 80}, 24);
  check(many.data.replicated == 0 && many.token_class == TokenClass::kRows64, "64 tokens: shared, one barrier");
  check(make_tiling({17, 5120, 10240, 64, 80}, 24).token_class == TokenClass::kRows32, "17 tokens: 32 rows");
  const Tiling down = make_tiling({64, 25600, 5120, 160, 160}, 24);
  check(down.data.pass_tokens == 1 && down.data.slot_tokens == 2 && down.data.block_columns == 64,
        "160 x 160: one token at once, three parts of its columns");
  const Tiling rows = make_tiling({129, 5120, 10240, 64, 80}, 24);
  check(rows.data.row_tiles == 2 && rows.data.tile_rows == 80, "129 tokens: two tiles of at most 80 rows");
  const Tiling prefill = make_tiling({4096, 5120, 10240, 64, 80}, 24);
  check(prefill.data.resident == 1 && prefill.data.tile_rows == 128 && prefill.data.chunks > 1,
        "5120 features: 128 rows of activations stay in L1, the next tokens are transformed meanwhile");
  const Tiling output = make_tiling({4096, 8192, 5120, 64, 0}, 24);
  check(output.data.resident == 1 && output.data.tile_rows == 96 && output.data.chunks > 1, "8192 features: 96 rows");
  check(make_tiling({256, 5120, 10240, 64, 80}, 24).data.chunks == 1, "256 tokens: two rows of tiles, one chunk");
  const Tiling bare = make_tiling({4096, 5120, 10240}, 24);
  check(bare.data.resident == 1 && bare.data.tile_rows == 128 && bare.data.tile_columns == 128 &&
            bare.data.step_depth == kGemmStepK && bare.data.chunks == 1,
        "no transform: nothing between the tiles");
  const Tiling wide = make_tiling({4096, 25600, 5120, 160, 160}, 24);
  check(wide.data.resident == 0 && wide.data.tile_rows == 128 && wide.data.tile_columns == 256,
        "25600 features: none stay");
  const Tiling plain = make_tiling({5, 4096, 4096}, 24);
  check(plain.factors == Factors::kNone && plain.ok(), "no transform");
  check(make_tiling({5, 4096, 4096, 32, 0}, 24).factors == Factors::kLeft, "left factor only");
  check(make_tiling({5, 4096, 4096, 0, 64}, 24).factors == Factors::kRight, "right factor only");
  const Tiling grouped = make_tiling({5, 4096, 4096, 0, 0, 16}, 24);
  check(grouped.data.group_size == 256 && grouped.data.groups == 16, "groups");
}

void test_refusals() {
  const auto refuses = [](const LinearShape& shape, const std::string& word) {
    const Tiling t = make_tiling(shape, 24);
    check(!t.ok() && t.error.find(word) != std::string::npos, "refused for " + word + ", found: " + t.error);
  };
  refuses({0, 64, 64}, "tokens");
  refuses({1, 60, 64}, "in_features");
  refuses({1, 40000, 64}, "in_features");
  refuses({1, 64, 70000}, "out_features");
  refuses({1, 96, 64, 8, 16}, "do not multiply");
  refuses({1, 60 * 8, 64, 60, 0, 1, false, 2.0f}, "clip_ratio");
  refuses({1, 144, 64, 12, 12}, "right");
  refuses({1, 8 * 300, 64, 300, 8}, "left");
  refuses({1, 256, 64, 0, 0, 8}, "groups");
  check(!make_tiling({1, 64, 64}, 0).ok(), "no cores");
  for (const LinearShape& shape : {LinearShape{64, 5120, 512, 64, 80}, LinearShape{400, 5120, 512},
                                   LinearShape{400, 256, 512, 16, 16}, LinearShape{400, 25600, 512, 160, 160}}) {
    check(!make_tiling(shape, 24, Pipelining::kAlways).ok(), "not pipelined: " + std::to_string(shape.in_features));
  }
}

bool same(const Tiling& a, const Tiling& b) {
  const TilingData &c = a.data, &d = b.data;
  return a.error == b.error && a.factors == b.factors && a.token_class == b.token_class && a.cores == b.cores &&
         a.workspace_bytes == b.workspace_bytes && c.tokens == d.tokens && c.in_features == d.in_features &&
         c.out_features == d.out_features && c.groups == d.groups && c.has_bias == d.has_bias && c.left == d.left &&
         c.right == d.right && c.scale_factor == d.scale_factor && c.inverse_factor == d.inverse_factor &&
         c.tile_rows == d.tile_rows && c.tile_columns == d.tile_columns && c.chunks == d.chunks;
}

void test_cache() {
  TilingCache cache;
  const LinearShape qkv{64, 5120, 10240, 64, 80};
  // Each differs from qkv in one property that a tiling depends on.
  std::vector<LinearShape> shapes(7, qkv);
  shapes[1].tokens = 65;
  shapes[2].in_features = 4096, shapes[2].right = 64;
  shapes[3].out_features = 5120;
  shapes[4].left = 0;
  shapes[5].right = 0;
  shapes[6].has_bias = true;
  for (int round = 0; round < 2; ++round) {
    for (LinearShape shape : shapes) {
      for (const float clip : {1.0f, 0.5f}) {
        shape.clip_ratio = clip;
        check(same(cache.Get(shape, 24), make_tiling(shape, 24)), "a cached tiling is that of its shape");
      }
    }
  }
  check(cache.size() == shapes.size(), "one entry for each shape, whatever its clip ratio");
  check(same(cache.Get(qkv, 20), make_tiling(qkv, 20)), "another number of cores");
  LinearShape clip = qkv;
  clip.clip_ratio = 1.5f;
  check(!cache.Get(clip, 24).ok(), "a clip ratio above 1 is refused although its shape is cached");
  const LinearShape odd{64, 5121, 10240};
  check(!cache.Get(odd, 24).ok() && cache.size() == shapes.size() + 1, "errors are not kept");

  TilingCache full;
  LinearShape growing{1, 64, 64};
  for (; growing.tokens <= static_cast<int64_t>(TilingCache::kMaxEntries) + 1; ++growing.tokens) full.Get(growing, 24);
  check(full.size() == 1, "a full cache starts again");
}

}  // namespace

int main() {
  test_models();
  test_balance();
  test_decisions();
  test_refusals();
  test_cache();
  return finish("tiling_test");
}
