// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 4
#include "split.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "activations.h"
#include "layout.h"
#include "scratch.h"
#include "vector.h"

namespace w4a4 {
namespace {

// Tokens that are multiplied at once, each as two.
constexpr int64_t kTokens = kMaxGemmTokens / 2;
// Tiles of weights that a thread takes at a time: their sums stay in its cache until the halves are added.
constexpr int64_t kItemTiles = 32;
constexpr float kHalf = 128.0f, kLargest = 127.0f * kHalf;

// One Scratch for each purpose. The last two hold what one thread works on, the others are the calling thread's.
thread_local Scratch q_scratch, panel_scratch, scale_scratch, sum_scratch, token_scratch, product_scratch;

struct Halves {
  int8_t *high, *low;
  float* scales;  // of high and low
  int32_t* sums;
};

void split(const float* x, int64_t features, int64_t stride, const Halves& halves) {
  float largest = 0.0f;
  bool is_finite = true;
  for (int64_t k = 0; k < features; ++k) {
    is_finite &= std::isfinite(x[k]);
    largest = std::max(largest, std::fabs(x[k]));
  }
  std::fill_n(halves.high, stride, int8_t{0});
  std::fill_n(halves.low, stride, int8_t{0});
  const float scale = is_finite ? largest / kLargest : std::numeric_limits<float>::quiet_NaN();
  halves.scales[0] = kHalf * scale;
  halves.scales[1] = scale;
  if (scale > 0.0f) {
    for (int64_t k = 0; k < features; ++k) {
      const float value = std::max(-kLargest, std::min(kLargest, std::nearbyint(x[k] / scale)));
      const float high = std::floor((value + kHalf / 2) / kHalf);
      halves.high[k] = static_cast<int8_t>(high);
      halves.low[k] = static_cast<int8_t>(value - kHalf * high);
    }
  }
  halves.sums[0] = sum_bytes(halves.high, features);
  halves.sums[1] = sum_bytes(halves.low, features);
}

// Adds the halves of `tokens` products [2 * tokens, rows] and the bias, and writes them to columns of y.
void add_halves(const float* product, int64_t tokens, int64_t rows, const float* bias, Dtype dtype, char* y,
                int64_t y_stride) {
  for (int64_t t = 0; t < tokens; ++t, y += y_stride) {
    const float *high = product + 2 * t * rows, *low = high + rows;
    float sum[kItemTiles * kTileRows];
    for (int64_t r = 0; r < rows; ++r) sum[r] = high[r] + low[r] + bias[r];
    store_floats(sum, rows, dtype, y);
  }
}

}  // namespace

void split_linear(const void* x, Dtype dtype, int64_t tokens, const Weight& weight, void* y, const Kernels& kernels,
                  const Pool& pool) {
  const int64_t features = weight.in_features, stride = token_stride(features), size = dtype_size(dtype);
  const int64_t chunk = std::min(tokens, kTokens);
  auto* q = q_scratch.get<int8_t>(2 * chunk * stride);
  auto* panels = panel_scratch.get<int8_t>(2 * chunk * stride + kPanelSlack);
  auto* scales = scale_scratch.get<float>(2 * chunk);
  auto* sums = sum_scratch.get<int32_t>(2 * chunk);
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    const int64_t count = std::min(chunk, tokens - begin);
    const char* source = static_cast<const char*>(x) + begin * features * size;
    pool.parallel_for(count, std::max<int64_t>(1, kQuantizeGrain / (16 * features)), [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        auto* token = token_scratch.get<float>(features);
        load_floats(source + t * features * size, dtype, features, token);
        int8_t* high = q + 2 * t * stride;
        split(token, features, stride, {high, high + stride, scales + 2 * t, sums + 2 * t});
      }
    });
    const Gemm& gemm = kernels.wide_int8.choose(2 * count, features, 1);
    GemmArgs args{};
    args.panels = Panels(2 * count, gemm.panel_tokens);
    for (int64_t panel = 0; panel < args.panels.count; ++panel) {
      make_panel(q, stride, nullptr, args.panels, panel, gemm, panels);
    }
    args.q = panels;
    args.scale = scales;
    args.q_sums = sums;
    args.in_features = features;
    args.groups = 1;
    args.dtype = Dtype::kFloat32;
    const int64_t tile_bytes = block_count(features) * kInt8BlockBytes;
    pool.parallel_for(ceil_div(tile_count(weight.out_features), kItemTiles), 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t row = item * kItemTiles * kTileRows;
        GemmArgs part = args;
        part.out_features = std::min(kItemTiles * kTileRows, weight.out_features - row);
        part.packed = static_cast<const char*>(weight.packed) + item * kItemTiles * tile_bytes;
        part.weight_scale = weight.scale + row;
        auto* product = product_scratch.get<float>(2 * count * part.out_features);
        part.y = product;
        gemm.run(part, 0, tile_count(part.out_features), 0, part.panels.count);
        float bias[kItemTiles * kTileRows] = {};
        if (weight.bias != nullptr) {
          const char* stored = static_cast<const char*>(weight.bias) + row * dtype_size(weight.bias_dtype);
          load_floats(stored, weight.bias_dtype, part.out_features, bias);
        }
        char* target = static_cast<char*>(y) + (begin * weight.out_features + row) * size;
        add_halves(product, count, part.out_features, bias, dtype, target, weight.out_features * size);
      }
    });
  }
}

}  // namespace w4a4
