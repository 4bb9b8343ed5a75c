// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 4
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "layout.h"
#include "vector.h"

namespace w4a4 {
namespace {

// Tokens quantized before they are multiplied; bounds the scratch memory of long prompts.
constexpr int64_t kTokenChunk = 512;
// Work, in multiplications, from which on waking another thread pays: some ten microseconds.
constexpr int64_t kQuantizeGrain = 300'000;

// Memory that a thread keeps from call to call, so that no call allocates once it has grown.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > size_) {
      memory_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(kAlignment))));
      size_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

// One Scratch for each purpose: a thread uses several at once.
thread_local Scratch q_scratch, panel_scratch, scale_scratch, sum_scratch, right_scratch, bias_scratch, token_scratch;

QuantizeArgs quantize_args(const void* x, Dtype dtype, int64_t features, const Transform& transform,
                           ActivationRange range, int64_t groups) {
  QuantizeArgs args{};
  args.q_min = range.min;
  args.q_max = range.max;
  args.x = x;
  args.dtype = dtype;
  args.features = features;
  args.left = transform.left;
  args.right = transform.right;
  args.left_trans = transform.left_trans;
  args.padded_right = ceil_div(transform.right, kTransformPadding) * kTransformPadding;
  args.clip = transform.clip;
  args.groups = groups;
  if (transform.right_trans != nullptr) {
    float* padded = right_scratch.get<float>(transform.right * args.padded_right);
    for (int64_t n = 0; n < transform.right; ++n) {
      float* row = padded + n * args.padded_right;
      std::copy_n(transform.right_trans + n * transform.right, transform.right, row);
      std::fill(row + transform.right, row + args.padded_right, 0.0f);
    }
    args.right_trans = padded;
  }
  return args;
}

// Quantizes one or a few tokens with every thread at work on each.
void quantize_by_rows(const QuantizeArgs& args, int64_t tokens, const Kernels& kernels, const Pool& pool) {
  const int64_t size = transform_scratch(args);
  float* scratch = token_scratch.get<float>(tokens * size);
  const int64_t parts = std::min(ceil_div(pool.threads, tokens), args.left);
  const auto for_rows = [&](const auto& body) {
    pool.parallel_for(tokens * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t token = item / parts, part = item % parts;
        body(token, part * args.left / parts, (part + 1) * args.left / parts, scratch + token * size);
      }
    });
  };
  for_rows([&](int64_t token, int64_t begin, int64_t end, float* s) {
    kernels.transform_right(args, token, begin, end, s);
  });
  for_rows([&](int64_t, int64_t begin, int64_t end, float* s) { kernels.transform_left(args, begin, end, s); });
  for (int64_t token = 0; token < tokens; ++token) kernels.quantize_transformed(args, token, scratch + token * size);
}

void quantize_tokens(const QuantizeArgs& args, int64_t tokens, const Kernels& kernels, const Pool& pool) {
  const bool transforms = args.left_trans != nullptr || args.right_trans != nullptr;
  // Without a transform a value costs about as much as 16 multiplications.
  const int64_t token_cost = args.features * (transforms ? args.left + args.right : 16);
  if (transforms && tokens < pool.threads && token_cost >= kQuantizeGrain) {
    return quantize_by_rows(args, tokens, kernels, pool);
  }
  pool.parallel_for(tokens, std::max<int64_t>(1, kQuantizeGrain / token_cost), [&](int64_t begin, int64_t end) {
    kernels.quantize(args, begin, end, token_scratch.get<float>(transform_scratch(args)));
  });
}

// `size` tokens q [size, stride] as one panel with units of type Unit.
template <class Unit>
void make_panel(const int8_t* q, int64_t stride, int64_t size, int8_t* panel) {
  constexpr int64_t kUnit = sizeof(Unit);
  for (int64_t k = 0; k < stride; k += kUnit) {
    for (int64_t t = 0; t < size; ++t, panel += kUnit) std::memcpy(panel, q + t * stride + k, kUnit);
  }
}

// Tokens q [tokens, stride] as the panels of `gemm`.
const int8_t* make_panels(const int8_t* q, int64_t stride, const Panels& panels, const Gemm& gemm, const Pool& pool) {
  if (panels.tokens == 1) return q;
  int8_t* target = panel_scratch.get<int8_t>(panels.tokens * stride);
  const auto make = gemm.panel_unit == 8 ? make_panel<uint64_t> : make_panel<uint32_t>;
  pool.parallel_for(panels.count, ceil_div(kQuantizeGrain, stride), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t offset = panels.begin(panel) * stride;
      make(q + offset, stride, panels.size(panel), target + offset);
    }
  });
  return target;
}

const float* float_bias(const Weight& weight) {
  if (weight.bias == nullptr || weight.bias_dtype == Dtype::kFloat32) return static_cast<const float*>(weight.bias);
  float* bias = bias_scratch.get<float>(weight.out_features);
  load_floats(weight.bias, weight.bias_dtype, weight.out_features, bias);
  return bias;
}

GemmArgs gemm_args(const Weight& weight, Dtype dtype, int32_t zero_point) {
  GemmArgs args{};
  args.zero_point = zero_point;
  args.packed = weight.packed;
  args.weight_scale = weight.scale;
  args.weight_offset = weight.offset;
  args.bias = float_bias(weight);
  args.quant_bias = weight.quant_bias;
  args.in_features = weight.in_features;
  args.out_features = weight.out_features;
  args.groups = weight.groups;
  args.dtype = dtype;
  return args;
}

// Splits by output tiles, which share nothing; a matrix with few tiles is split by tokens as well.
void multiply(const GemmArgs& args, const Gemm& gemm, const Pool& pool) {
  const int64_t tiles = tile_count(args.out_features);
  const bool few_tiles = tiles < 4 * pool.threads;
  const int64_t part = std::max<int64_t>(1, (few_tiles ? 32 : kMaxGemmTokens) / gemm.panel_tokens);
  const int64_t panels = args.panels.count, parts = ceil_div(panels, part);
  if (!few_tiles) {
    pool.parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = 0; panel < panels; panel += part) {
        gemm.run(args, begin, end, panel, std::min(panel + part, panels));
      }
    });
    return;
  }
  pool.parallel_for(parts * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t tile = item / parts, panel = item % parts * part;
      gemm.run(args, tile, tile + 1, panel, std::min(panel + part, panels));
    }
  });
}

void* row_of(void* y, Dtype dtype, int64_t columns, int64_t row) {
  return static_cast<char*>(y) + row * columns * dtype_size(dtype);
}

// Quantizes and multiplies, some hundred tokens at a time.
void linear(const void* x, Dtype dtype, int64_t tokens, QuantizeArgs quantize, GemmArgs args, void* y,
            const Kernels& kernels, const Gemm& gemm, const Pool& pool) {
  const int64_t chunk = std::min(tokens, kTokenChunk);
  const int64_t stride = block_count(args.in_features) * kBlockFeatures;
  quantize.q_stride = stride;
  quantize.q = q_scratch.get<int8_t>(chunk * stride);
  quantize.scale = scale_scratch.get<float>(chunk);
  quantize.q_sums = sum_scratch.get<int32_t>(chunk * args.groups);
  args.scale = quantize.scale;
  args.q_sums = quantize.q_sums;
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    const int64_t count = std::min(chunk, tokens - begin);
    quantize.x = static_cast<const char*>(x) + begin * args.in_features * dtype_size(dtype);
    quantize_tokens(quantize, count, kernels, pool);
    args.panels = Panels(count, gemm.panel_tokens);
    args.q = make_panels(quantize.q, stride, args.panels, gemm, pool);
    args.y = row_of(y, dtype, args.out_features, begin);
    multiply(args, gemm, pool);
  }
}

// Multiplies tokens that are quantized already.
void quantized_linear(const int8_t* q, const float* scale, int64_t tokens, const Weight& weight, int32_t zero_point,
                      void* y, Dtype dtype, const Gemm& gemm, const Pool& pool) {
  const int64_t chunk = std::min(tokens, kTokenChunk);
  const int64_t stride = block_count(weight.in_features) * kBlockFeatures;
  const int64_t group_size = weight.in_features / weight.groups;
  int8_t* padded = q_scratch.get<int8_t>(chunk * stride);
  int32_t* sums = sum_scratch.get<int32_t>(chunk * weight.groups);
  GemmArgs args = gemm_args(weight, dtype, zero_point);
  args.q_sums = sums;
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    const int64_t count = std::min(chunk, tokens - begin);
    for (int64_t t = 0; t < count; ++t) {
      const int8_t* source = q + (begin + t) * weight.in_features;
      std::fill(std::copy_n(source, weight.in_features, padded + t * stride), padded + (t + 1) * stride, int8_t{0});
      for (int64_t g = 0; g < weight.groups; ++g) {
        sums[t * weight.groups + g] = sum_bytes(source + g * group_size, group_size);
      }
    }
    args.panels = Panels(count, gemm.panel_tokens);
    args.q = make_panels(padded, stride, args.panels, gemm, pool);
    args.scale = scale + begin;
    args.y = row_of(y, dtype, weight.out_features, begin);
    multiply(args, gemm, pool);
  }
}

const Gemm& int4_gemm(const Kernels& kernels, ActivationRange range) {
  return range.max > kInt4Range.max ? kernels.wide_int4 : kernels.int4;
}

}  // namespace

void flatquant_linear(const void* x, Dtype dtype, int64_t tokens, const Transform& transform, ActivationRange range,
                      const Weight& weight, void* y, const Kernels& kernels, const Pool& pool) {
  const QuantizeArgs quantize = quantize_args(x, dtype, weight.in_features, transform, range, weight.groups);
  linear(x, dtype, tokens, quantize, gemm_args(weight, dtype, kZeroPoint), y, kernels, int4_gemm(kernels, range), pool);
}

void w8a8_linear(const void* x, Dtype dtype, int64_t tokens, const Transform& transform, const Weight& weight, void* y,
                 const Kernels& kernels, const Pool& pool) {
  const QuantizeArgs quantize = quantize_args(x, dtype, weight.in_features, transform, kInt8Range, weight.groups);
  linear(x, dtype, tokens, quantize, gemm_args(weight, dtype, 0), y, kernels, kernels.int8, pool);
}

void kronecker_quant(const void* x, Dtype dtype, int64_t tokens, int64_t features, const Transform& transform,
                     ActivationRange range, int8_t* q, float* scale, const Kernels& kernels, const Pool& pool) {
  QuantizeArgs args = quantize_args(x, dtype, features, transform, range, 1);
  args.q = q;
  args.q_stride = features;
  args.scale = scale;
  quantize_tokens(args, tokens, kernels, pool);
}

void int4_linear(const int8_t* q, const float* scale, int64_t tokens, ActivationRange range, const Weight& weight,
                 void* y, Dtype dtype, const Kernels& kernels, const Pool& pool) {
  quantized_linear(q, scale, tokens, weight, kZeroPoint, y, dtype, int4_gemm(kernels, range), pool);
}

void int8_linear(const int8_t* q, const float* scale, int64_t tokens, const Weight& weight, void* y, Dtype dtype,
                 const Kernels& kernels, const Pool& pool) {
  quantized_linear(q, scale, tokens, weight, 0, y, dtype, kernels.wide_int8, pool);
}

}  // namespace w4a4
