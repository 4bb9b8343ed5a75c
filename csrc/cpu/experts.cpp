// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 4
#include "experts.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "activations.h"
#include "layout.h"
#include "scratch.h"
#include "vector.h"

namespace w4a4 {
namespace {

// Pairs of token and expert that are computed at once; bounds the scratch memory, some 12 KB a pair for 2048 features.
constexpr int64_t kPairChunk = 4096;
// Tiles of weights that a thread takes at a time: with those of one token's experts all threads are busy, and each
// piece is long enough to come from memory as a stream.
constexpr int64_t kItemTiles = 8;
// Values of the weighted sum from which on another thread pays.
constexpr int64_t kSumGrain = 32768;

// One Scratch for each purpose. The last holds what one thread works on, the others are the calling thread's.
thread_local Scratch q_scratch, scale_scratch, sum_scratch, pair_q_scratch, pair_scale_scratch, pair_sum_scratch,
    panel_scratch, product_scratch, hidden_scratch;

// body(0), ..., body(count - 1), each thread taking the next when it is free: experts have different numbers of tokens.
template <class Body>
void for_each_item(int64_t count, const Pool& pool, const Body& body) {
  std::atomic<int64_t> next{0};
  pool.parallel_for(std::min(count, pool.threads), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t item = next++; item < count; item = next++) body(item);
    }
  });
}

// Pairs of token and expert, sorted by expert. Position p of the order is a row of all that is computed per pair.
struct Order {
  std::vector<int64_t> first;     // [experts + 1]: expert e has positions first[e] to first[e + 1]
  std::vector<int32_t> token;     // [pairs]: of each position
  std::vector<int32_t> position;  // [tokens * top_k]: of each pair, -1 if its expert is not here
  std::vector<int64_t> active;    // experts with tokens

  Order(const int32_t* experts, int64_t tokens, int64_t top_k, int64_t expert_count)
      : first(expert_count + 1), position(tokens * top_k, -1) {
    for (int64_t pair = 0; pair < tokens * top_k; ++pair) {
      if (experts[pair] >= 0) ++first[experts[pair] + 1];
    }
    for (int64_t e = 0; e < expert_count; ++e) {
      if (first[e + 1] > 0) active.push_back(e);
      first[e + 1] += first[e];
    }
    token.resize(first[expert_count]);
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t pair = 0; pair < tokens * top_k; ++pair) {
      if (experts[pair] < 0) continue;
      position[pair] = static_cast<int32_t>(next[experts[pair]]++);
      token[position[pair]] = static_cast<int32_t>(pair / top_k);
    }
  }
  int64_t pairs() const { return static_cast<int64_t>(token.size()); }
  int64_t count(int64_t expert) const { return first[expert + 1] - first[expert]; }
};

// Quantized pairs, the input of a product.
struct Pairs {
  int8_t* q;  // [pairs, stride]
  int64_t stride;
  float* scale;   // [pairs]
  int32_t* sums;  // [pairs, groups]
};

// Without q.
Pairs new_pairs(int64_t pairs, const ExpertWeights& weights) {
  return {nullptr, token_stride(weights.in_features), pair_scale_scratch.get<float>(pairs),
          pair_sum_scratch.get<int32_t>(pairs * weights.groups)};
}

bool is_int4(const ExpertWeights& weights) { return weights.block_bytes == kBlockBytes; }

ActivationRange activation_range(const ExpertWeights& weights) {
  return is_int4(weights) && !weights.wide_activations ? kInt4Range : kInt8Range;
}

const Gemm& gemm_of(const ExpertWeights& weights, const Kernels& kernels) {
  if (!is_int4(weights)) return kernels.int8;
  return weights.wide_activations ? kernels.wide_int4 : kernels.int4;
}

// Gemm for the pairs of each expert, which may be few or many.
struct Gemms {
  const Gemm& gemm;
  const Order& order;
  int64_t in_features, groups;

  Gemms(const ExpertWeights& weights, const Order& order, const Kernels& kernels)
      : gemm(gemm_of(weights, kernels)), order(order), in_features(weights.in_features), groups(weights.groups) {}
  const Gemm& of(int64_t expert) const { return gemm.choose(order.count(expert), in_features, groups); }
  Panels panels(int64_t expert) const { return Panels(order.count(expert), of(expert).panel_tokens); }
};

Transform transform_of(const ExpertTransform& transform, int64_t expert) {
  const auto part = [&](const float* factors, int64_t count, int64_t size) {
    return factors == nullptr || count == 1 ? factors : factors + expert * size * size;
  };
  return {transform.left, transform.right, part(transform.left_trans, transform.left_count, transform.left),
          part(transform.right_trans, transform.right_count, transform.right),
          transform.clip[transform.clip_count == 1 ? 0 : expert]};
}

GemmArgs gemm_args(const ExpertWeights& weights, int64_t expert, const Pairs& pairs, const Order& order, float* y) {
  const int64_t first = order.first[expert], rows = expert * weights.out_features;
  const int64_t bytes = tile_count(weights.out_features) * block_count(weights.in_features) * weights.block_bytes;
  GemmArgs args{};
  args.q = pairs.q + first * pairs.stride;
  args.scale = pairs.scale + first;
  args.q_sums = pairs.sums + first * weights.groups;
  args.packed = static_cast<const char*>(weights.packed) + expert * bytes;
  args.zero_point = is_int4(weights) ? kZeroPoint : 0;
  args.weight_scale = weights.scale + rows * weights.groups;
  args.weight_offset = weights.offset != nullptr ? weights.offset + rows * weights.groups : nullptr;
  args.bias = weights.bias != nullptr ? weights.bias + rows : nullptr;
  args.in_features = weights.in_features;
  args.out_features = weights.out_features;
  args.groups = weights.groups;
  args.y = y + first * weights.out_features;
  args.dtype = Dtype::kFloat32;
  return args;
}

// Part `part` of `parts` of an expert's work.
struct Item {
  int64_t expert, part;
};

// The items of all experts with tokens, of which each has parts(expert).
template <class Parts>
std::vector<Item> items_of(const Order& order, const Parts& parts) {
  std::vector<Item> items;
  for (const int64_t expert : order.active) {
    for (int64_t part = 0; part < parts(expert); ++part) items.push_back({expert, part});
  }
  return items;
}

// y [pairs, out_features] of the pairs in panels, by expert, tiles and tokens.
void multiply(const ExpertWeights& weights, const Pairs& pairs, const Order& order, float* y, const Kernels& kernels,
              const Pool& pool) {
  const Gemms gemms(weights, order, kernels);
  const int64_t tiles = tile_count(weights.out_features);
  const int64_t tile_parts = ceil_div(tiles, kItemTiles);
  const auto most_panels = [&](int64_t expert) {
    return std::max<int64_t>(1, kMaxGemmTokens / gemms.of(expert).panel_tokens);
  };
  const std::vector<Item> items = items_of(
      order, [&](int64_t expert) { return tile_parts * ceil_div(gemms.panels(expert).count, most_panels(expert)); });
  for_each_item(static_cast<int64_t>(items.size()), pool, [&](int64_t i) {
    const auto [expert, part] = items[i];
    GemmArgs args = gemm_args(weights, expert, pairs, order, y);
    args.panels = gemms.panels(expert);
    const int64_t tile = part % tile_parts * kItemTiles, panel = part / tile_parts * most_panels(expert);
    gemms.of(expert).run(args, tile, std::min(tile + kItemTiles, tiles), panel,
                         std::min(panel + most_panels(expert), args.panels.count));
  });
}

// Brings the pairs of every expert into panels. Pair p is row rows[p] of q, or row p if `rows` is null.
Pairs to_panels(const Pairs& pairs, const int32_t* rows, const Order& order, const Gemms& gemms, const Pool& pool) {
  Pairs result = pairs;
  result.q = panel_scratch.get<int8_t>(order.pairs() * pairs.stride + kPanelSlack);
  const std::vector<Item> items = items_of(order, [&](int64_t expert) { return gemms.panels(expert).count; });
  const int64_t grain = ceil_div(kQuantizeGrain, pairs.stride);
  pool.parallel_for(static_cast<int64_t>(items.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = order.first[items[i].expert];
      const int8_t* q = rows != nullptr ? pairs.q : pairs.q + first * pairs.stride;
      make_panel(q, pairs.stride, rows != nullptr ? rows + first : nullptr, gemms.panels(items[i].expert),
                 items[i].part, gemms.of(items[i].expert), result.q + first * pairs.stride);
    }
  });
  return result;
}

// Transforms and quantizes each token once, however many experts it goes to, and gives every pair its token's.
Pairs quantize_input(const void* x, Dtype dtype, int64_t tokens, const ExpertTransform& transform,
                     const ExpertWeights& weights, const Order& order, const Kernels& kernels, const Pool& pool) {
  Pairs pairs = new_pairs(order.pairs(), weights);
  QuantizeArgs args = quantize_args(x, dtype, weights.in_features, transform_of(transform, 0),
                                    activation_range(weights), weights.groups);
  args.q = q_scratch.get<int8_t>(tokens * pairs.stride);
  args.q_stride = pairs.stride;
  args.scale = scale_scratch.get<float>(tokens);
  args.q_sums = sum_scratch.get<int32_t>(tokens * weights.groups);
  quantize_tokens(args, tokens, kernels, pool);
  for (int64_t p = 0; p < order.pairs(); ++p) {
    pairs.scale[p] = args.scale[order.token[p]];
    std::copy_n(args.q_sums + order.token[p] * weights.groups, weights.groups, pairs.sums + p * weights.groups);
  }
  pairs.q = args.q;
  return to_panels(pairs, order.token.data(), order, Gemms(weights, order, kernels), pool);
}

// silu(gate) * up of every pair, transformed and quantized as its expert wants it.
Pairs quantize_hidden(const float* gate_up, const ExpertTransform& transform, const ExpertWeights& weights,
                      const Order& order, const Kernels& kernels, const Pool& pool) {
  const int64_t features = weights.in_features;
  Pairs pairs = new_pairs(order.pairs(), weights);
  pairs.q = pair_q_scratch.get<int8_t>(order.pairs() * pairs.stride);
  // Few pairs at a time, so that all threads have some; the expert's factors are prepared once for them.
  const int64_t together = std::clamp<int64_t>(order.pairs() / (4 * pool.threads), 1, 32);
  const std::vector<Item> items =
      items_of(order, [&](int64_t expert) { return ceil_div(order.count(expert), together); });
  for_each_item(static_cast<int64_t>(items.size()), pool, [&](int64_t i) {
    const auto [expert, part] = items[i];
    float* hidden = hidden_scratch.get<float>(features);
    QuantizeArgs args = quantize_args(hidden, Dtype::kFloat32, features, transform_of(transform, expert),
                                      activation_range(weights), weights.groups);
    args.q_stride = pairs.stride;
    const int64_t begin = order.first[expert] + part * together;
    const int64_t end = std::min(begin + together, order.first[expert + 1]);
    for (int64_t p = begin; p < end; ++p) {
      const float* gate = gate_up + 2 * p * features;
      kernels.silu_and_mul(gate, gate + features, features, hidden);
      args.q = pairs.q + p * pairs.stride;
      args.scale = pairs.scale + p;
      args.q_sums = pairs.sums + p * weights.groups;
      quantize_here(args, 0, 1, kernels);
    }
  });
  return to_panels(pairs, nullptr, order, Gemms(weights, order, kernels), pool);
}

// Where the results go.
struct Output {
  char* values;  // [tokens, features]
  bool is_double;
  Dtype dtype;  // if not is_double

  int64_t value_bytes() const { return is_double ? sizeof(double) : dtype_size(dtype); }
  // Writes `count` values from value `first` on.
  void store(const double* source, int64_t count, int64_t first) const {
    char* target = values + first * value_bytes();
    if (is_double) {
      std::memcpy(target, source, count * sizeof(double));
      return;
    }
    constexpr int64_t kPart = 64;
    float rounded[kPart];
    for (int64_t begin = 0; begin < count; begin += kPart) {
      const int64_t part = std::min(kPart, count - begin);
      for (int64_t i = 0; i < part; ++i) rounded[i] = static_cast<float>(source[begin + i]);
      store_floats(rounded, part, dtype, target + begin * dtype_size(dtype));
    }
  }
};

// y[t] = sum_j weights[t][j] * product[position of (t, j)].
void add_up(const float* product, int64_t features, const Routing& routing, const Order& order, int64_t tokens,
            const Output& y, const Pool& pool) {
  constexpr int64_t kPart = 1024;
  const int64_t parts = ceil_div(features, kPart);
  const int64_t grain = ceil_div(kSumGrain, kPart * routing.top_k);
  pool.parallel_for(tokens * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t token = item / parts, first = item % parts * kPart;
      const int64_t count = std::min(kPart, features - first);
      double sum[kPart] = {};
      for (int64_t pair = token * routing.top_k; pair < (token + 1) * routing.top_k; ++pair) {
        if (order.position[pair] < 0) continue;
        const float* row = product + order.position[pair] * features + first;
        const double weight = routing.weights[pair];
        for (int64_t i = 0; i < count; ++i) sum[i] += weight * row[i];
      }
      y.store(sum, count, token * features + first);
    }
  });
}

}  // namespace

void experts_mlp(const void* x, Dtype dtype, int64_t tokens, const Routing& routing,
                 const ExpertTransform& gate_up_transform, const ExpertWeights& gate_up,
                 const ExpertTransform& down_transform, const ExpertWeights& down, void* y, bool is_double,
                 const Kernels& kernels, const Pool& pool) {
  const int64_t chunk = std::max<int64_t>(1, kPairChunk / std::max<int64_t>(1, routing.top_k));
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    const int64_t count = std::min(chunk, tokens - begin);
    const Routing part{routing.weights + begin * routing.top_k, routing.experts + begin * routing.top_k, routing.top_k};
    const Order order(part.experts, count, routing.top_k, gate_up.experts);
    const char* source = static_cast<const char*>(x) + begin * gate_up.in_features * dtype_size(dtype);
    Output target{static_cast<char*>(y), is_double, dtype};
    target.values += begin * down.out_features * target.value_bytes();
    // The second product may overwrite the first, which is no longer needed by then.
    float* product = product_scratch.get<float>(order.pairs() * std::max(gate_up.out_features, down.out_features));
    const Pairs input = quantize_input(source, dtype, count, gate_up_transform, gate_up, order, kernels, pool);
    multiply(gate_up, input, order, product, kernels, pool);
    const Pairs hidden = quantize_hidden(product, down_transform, down, order, kernels, pool);
    multiply(down, hidden, order, product, kernels, pool);
    add_up(product, down.out_features, part, order, count, target, pool);
  }
}

}  // namespace w4a4
