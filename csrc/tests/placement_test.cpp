// SPDX-License-Identifier: Apache-2.0
#include "placement_test.h"

#include <map>
#include <string>
#include <vector>

#include "harness.h"
#include "placement.h"
#include "random.h"
#include "weight_only.h"

namespace {

constexpr int64_t kFeatures = 16, kNobody = -1;

int64_t current_thread = kNobody;

// Owners of the tiles that the fake products below were asked for.
std::vector<int64_t>* multiplied_by = nullptr;

// Threads that run one after the other, so that what each does can be seen. Like torch, gives each an equal range.
w4a4::Pool numbered_threads(int64_t threads) {
  return {[threads](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
            const int64_t parts = std::min(threads, w4a4::ceil_div(count, std::max<int64_t>(grain, 1)));
            const int64_t size = parts > 0 ? w4a4::ceil_div(count, parts) : 0;
            for (current_thread = 0; current_thread < parts && current_thread * size < count; ++current_thread) {
              body(current_thread * size, std::min(count, (current_thread + 1) * size));
            }
            current_thread = kNobody;
          },
          threads};
}

void record(int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    int64_t& owner = (*multiplied_by)[tile];
    check(owner == kNobody || owner == current_thread, "two threads multiply tile " + std::to_string(tile));
    owner = current_thread;
  }
}

// The kernels of the portable set, with products that note who runs them.
w4a4::Kernels recording_kernels() {
  w4a4::Kernels kernels = *w4a4::all_kernels().back();
  const auto run = [](const w4a4::GemmArgs&, int64_t begin, int64_t end, int64_t, int64_t) { record(begin, end); };
  for (w4a4::Gemm* gemm : {&kernels.int4, &kernels.int8, &kernels.wide_int4, &kernels.wide_int8}) {
    gemm->run = run;
    gemm->for_many = nullptr;
  }
  kernels.weight_only = [](const w4a4::WeightOnlyArgs&, int64_t begin, int64_t end) { record(begin, end); };
  return kernels;
}

// Owners of the tiles by who changes them from `before`, seen after each thread.
template <typename Work>
std::vector<int64_t> owners_of(int64_t tiles, int64_t threads, Work work) {
  const int64_t tile_bytes = w4a4::block_count(kFeatures) * w4a4::kBlockBytes;
  std::vector<uint8_t> packed(tiles * tile_bytes, 0xFF);
  std::vector<int64_t> owners(tiles, kNobody);
  w4a4::Pool pool = numbered_threads(threads), watched = pool;
  watched.parallel_for = [&](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    pool.parallel_for(count, grain, [&](int64_t begin, int64_t end) {
      body(begin, end);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        bool is_changed = false;
        for (int64_t i = tile * tile_bytes; i < (tile + 1) * tile_bytes; ++i) is_changed |= packed[i] != 0xFF;
        if (is_changed && owners[tile] == kNobody) owners[tile] = current_thread;
      }
    });
  };
  work(packed.data(), tile_bytes, watched);
  return owners;
}

void test_the_product_reads_what_its_threads_have_touched(int64_t tiles, int64_t threads) {
  const auto placed = owners_of(tiles, threads, [&](uint8_t* packed, int64_t tile_bytes, const w4a4::Pool& pool) {
    w4a4::zero_tiles(packed, tiles, tile_bytes, pool);
  });
  const w4a4::Kernels kernels = recording_kernels();
  const int64_t out = tiles * w4a4::kTileRows;
  const std::vector<float> scale(out, 1.0f);
  const std::vector<int8_t> memory(out * kFeatures);
  const w4a4::Weight weight{memory.data(), scale.data(), nullptr, nullptr, w4a4::Dtype::kFloat32, out, kFeatures, 1};
  const w4a4::Transform identity{1, kFeatures, nullptr, nullptr, 1.0f};
  const w4a4::Pool pool = numbered_threads(threads);
  // Beyond 32 tokens, a weight with few tiles is split by tokens too.
  for (const int64_t tokens : {1, 5, 32, 600}) {
    if (tokens > 32 && tiles < 4 * threads) continue;
    const std::vector<float> x(tokens * kFeatures, 1.0f), token_scale(tokens, 1.0f);
    const std::vector<int8_t> q(tokens * kFeatures, 1);
    std::vector<float> y(tokens * out);
    for (int product = 0; product < 5; ++product) {
      std::vector<int64_t> owners(tiles, kNobody);
      multiplied_by = &owners;
      const auto float32 = w4a4::Dtype::kFloat32;
      if (product == 0) {
        w4a4::flatquant_linear(x.data(), float32, tokens, identity, w4a4::kInt4Range, weight, y.data(), kernels, pool);
      } else if (product == 1) {
        w4a4::w8a8_linear(x.data(), float32, tokens, identity, weight, y.data(), kernels, pool);
      } else if (product == 2) {
        w4a4::int4_linear(q.data(), token_scale.data(), tokens, w4a4::kInt8Range, weight, y.data(), float32, kernels,
                          pool);
      } else if (product == 3) {
        w4a4::int8_linear(q.data(), token_scale.data(), tokens, weight, y.data(), float32, kernels, pool);
      } else {
        w4a4::weight_only_linear(x.data(), float32, tokens, weight, true, y.data(), kernels, pool);
      }
      check(owners == placed, "product " + std::to_string(product) + " of " + std::to_string(tokens) + " tokens, " +
                                  std::to_string(tiles) + " tiles and " + std::to_string(threads) +
                                  " threads reads what other threads have touched first");
    }
  }
}

void test_all_threads_pack(int64_t tiles, int64_t first_row, int64_t rows, int64_t threads) {
  const int64_t features = 1 << 12;  // so many that one tile is worth a thread
  const std::vector<int8_t> weight(rows * features, 3);
  std::vector<uint8_t> packed(tiles * w4a4::block_count(features) * w4a4::kBlockBytes);
  std::vector<int64_t> parts;
  w4a4::Pool pool = numbered_threads(threads);
  const w4a4::ParallelFor inner = pool.parallel_for;
  pool.parallel_for = [&](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    inner(count, grain, [&](int64_t begin, int64_t end) {
      parts.push_back(end - begin);
      body(begin, end);
    });
  };
  w4a4::pack_rows(weight.data(), rows, features, first_row, packed.data(), pool);
  const std::string what = std::to_string(rows) + " rows from " + std::to_string(first_row) + " on";
  check(static_cast<int64_t>(parts.size()) == threads, "all threads pack " + what);
  check(*std::max_element(parts.begin(), parts.end()) - *std::min_element(parts.begin(), parts.end()) <= 1,
        "threads pack equal parts of " + what);
}

// Any number of threads and any order of the shards of a fused layer give the same bytes, none outside the rows.
void test_packing_does_not_depend_on_threads() {
  Random random(5);
  const int64_t out = 150;
  for (const int64_t features : {7, 77, 8192}) {
    const auto weight = random.bytes(out * features, -8, 7);
    const auto bytes = random.bytes(out * features, -127, 127);
    const auto expected = pack(weight, out, features);
    const auto expected_bytes = pack_int8(bytes, out, features);
    for (const int64_t threads : {1, 3, 4}) {
      std::vector<uint8_t> packed(expected.size(), w4a4::kZeroPoint << 4 | w4a4::kZeroPoint);
      std::vector<int8_t> packed_bytes(expected_bytes.size());
      for (const auto& [first, last] : std::map<int64_t, int64_t>{{100, 150}, {0, 33}, {33, 100}}) {
        w4a4::pack_rows(&weight[first * features], last - first, features, first, packed.data(), make_pool(threads));
        w4a4::pack_int8_rows(&bytes[first * features], last - first, features, first, packed_bytes.data(),
                             make_pool(threads));
      }
      const std::string what = std::to_string(features) + " features, " + std::to_string(threads) + " threads";
      check(packed == expected, "int4 packed in three parts, " + what);
      check(packed_bytes == expected_bytes, "int8 packed in three parts, " + what);
    }
  }
}

// Every value of int8 in every place of a block and of what is left after the last one.
void test_values_outside_int4_are_noticed() {
  constexpr int64_t kRows = 18, kOdd = 21;
  std::vector<uint8_t> packed(w4a4::tile_count(kRows) * w4a4::block_count(kOdd) * w4a4::kBlockBytes);
  for (int value = -128; value < 128; ++value) {
    for (int64_t place = 0; place < kRows * kOdd; ++place) {
      std::vector<int8_t> weight(kRows * kOdd, -8);
      weight[place] = static_cast<int8_t>(value);
      const bool is_right = w4a4::pack_rows(weight.data(), kRows, kOdd, 0, packed.data(), no_threads());
      if (is_right != (value >= -8 && value <= 7)) {
        check(false, "value " + std::to_string(value) + " at " + std::to_string(place));
      }
    }
  }
  check(true, "values outside int4");
}

// The definitions in layout.h, value by value.
void test_layout() {
  Random random(6);
  for (const int64_t features : {1, 8, 9, 77}) {
    const int64_t out = 40, blocks = w4a4::block_count(features);
    const auto weight = random.bytes(out * features, -8, 7);
    const auto packed = pack(weight, out, features);
    const auto packed_bytes = pack_int8(weight, out, features);
    bool is_right = true;
    for (int64_t row = 0; row < 48; ++row) {
      for (int64_t k = 0; k < blocks * 8; ++k) {
        const int value = row < out && k < features ? weight[row * features + k] : 0;
        const int64_t block = row / 16 * blocks + k / 8, place = 4 * (row % 16) + k % 4;
        const uint8_t byte = packed[block * 64 + place];
        is_right &= (k % 8 < 4 ? byte & 15 : byte >> 4) == value + 8;
        is_right &= packed_bytes[block * 128 + k % 8 / 4 * 64 + place] == value;
      }
    }
    check(is_right, "layout of " + std::to_string(features) + " features");
  }
}

}  // namespace

void test_placement() {
  for (const int64_t threads : {1, 2, 4, 32, 128}) {
    for (const int64_t tiles : {1, 3, 31, 160, 640, 3200}) {
      test_the_product_reads_what_its_threads_have_touched(tiles, threads);
    }
  }
  for (const int64_t threads : {2, 4, 32}) {
    test_all_threads_pack(640, 0, 1024, threads);
    test_all_threads_pack(640, 8192 + 512, 1024, threads);  // a shard in the second half of a fused layer
  }
  test_packing_does_not_depend_on_threads();
  test_values_outside_int4_are_noticed();
  test_layout();
}
