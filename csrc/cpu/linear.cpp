// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 4
#include "linear.h"

#include <algorithm>

#include "activations.h"
#include "layout.h"
#include "scratch.h"
#include "vector.h"

namespace w4a4 {
namespace {

// Tokens quantized before they are multiplied; bounds the scratch memory of long prompts.
constexpr int64_t kTokenChunk = 512;

// One Scratch for each purpose: a thread uses several at once.
thread_local Scratch q_scratch, panel_scratch, scale_scratch, sum_scratch, bias_scratch, norm_floats;

// Tokens q [tokens, stride] as the panels of `gemm`.
const int8_t* make_panels(const int8_t* q, int64_t stride, const Panels& panels, const Gemm& gemm, const Pool& pool) {
  if (panels.tokens == 1) return q;
  int8_t* target = panel_scratch.get<int8_t>(panels.tokens * stride + kPanelSlack);
  pool.parallel_for(panels.count, ceil_div(kQuantizeGrain, stride), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) make_panel(q, stride, nullptr, panels, panel, gemm, target);
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

// Splits by output tiles, which share nothing; a matrix with few tiles is split by tokens as well, which for up to 32
// tokens gives each thread the same tiles.
void multiply(const GemmArgs& args, const Gemm& gemm, const Pool& pool) {
  const int64_t tiles = tile_count(args.out_features);
  const bool few_tiles = tiles < 4 * pool.threads;
  const int64_t part = std::max<int64_t>(1, (few_tiles ? 32 : kMaxGemmTokens) / gemm.panel_tokens);
  const int64_t panels = args.panels.count, parts = ceil_div(panels, part);
  if (!few_tiles) {
    for_tiles(tiles, pool, [&](int64_t begin, int64_t end) {
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
            const Kernels& kernels, const Gemm& gemms, const Pool& pool, const Step& step = {}) {
  const int64_t chunk = std::min(tokens, kTokenChunk);
  const int64_t stride = token_stride(args.in_features);
  quantize.q_stride = stride;
  quantize.q = q_scratch.get<int8_t>(chunk * stride);
  quantize.scale = scale_scratch.get<float>(chunk);
  quantize.q_sums = sum_scratch.get<int32_t>(chunk * args.groups);
  args.scale = quantize.scale;
  args.q_sums = quantize.q_sums;
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    const int64_t count = std::min(chunk, tokens - begin);
    const int64_t row_bytes = step.row_features(args.in_features) * dtype_size(dtype);
    quantize.x = static_cast<const char*>(x) + begin * row_bytes;
    quantize_tokens(quantize, count, kernels, pool, step.from_token(begin));
    const Gemm& gemm = gemms.choose(count, args.in_features, args.groups);
    args.panels = Panels(count, gemm.panel_tokens);
    args.q = make_panels(quantize.q, stride, args.panels, gemm, pool);
    args.y = row_of(y, dtype, args.out_features, begin);
    multiply(args, gemm, pool);
  }
}

// Multiplies tokens that are quantized already.
void quantized_linear(const int8_t* q, const float* scale, int64_t tokens, const Weight& weight, int32_t zero_point,
                      void* y, Dtype dtype, const Gemm& gemms, const Pool& pool) {
  const int64_t chunk = std::min(tokens, kTokenChunk);
  const int64_t stride = token_stride(weight.in_features);
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
    const Gemm& gemm = gemms.choose(count, args.in_features, args.groups);
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

Step Step::from_token(int64_t token) const {
  Step step = *this;
  const int64_t bytes = token * norm.features * dtype_size(norm.dtype);
  if (norm.x != nullptr) step.norm.x = static_cast<const char*>(norm.x) + bytes;
  if (norm.residual != nullptr) step.norm.residual = static_cast<char*>(norm.residual) + bytes;
  return step;
}

void* thread_scratch(int64_t bytes) {
  thread_local Scratch scratch;
  return scratch.get<char>(bytes);
}

void flatquant_linear(const void* x, Dtype dtype, int64_t tokens, const Transform& transform, ActivationRange range,
                      const Weight& weight, void* y, const Kernels& kernels, const Pool& pool, const Step& step) {
  const QuantizeArgs quantize = quantize_args(x, dtype, weight.in_features, transform, range, weight.groups);
  linear(x, dtype, tokens, quantize, gemm_args(weight, dtype, kZeroPoint), y, kernels, int4_gemm(kernels, range), pool,
         step);
}

void rms_norm(const NormArgs& args, int64_t tokens, void* y, const Kernels& kernels, const Pool& pool) {
  // A value costs about as much as 16 multiplications.
  pool.parallel_for(tokens, std::max<int64_t>(1, kQuantizeGrain / (16 * args.features)),
                    [&](int64_t begin, int64_t end) {
                      float* scratch = norm_floats.get<float>(norm_scratch(args.features));
                      for (int64_t token = begin; token < end; ++token) {
                        kernels.rms_norm(args, token, scratch, row_of(y, args.dtype, args.features, token));
                      }
                    });
}

void w8a8_linear(const void* x, Dtype dtype, int64_t tokens, const Transform& transform, const Weight& weight, void* y,
                 const Kernels& kernels, const Pool& pool) {
  const QuantizeArgs quantize = quantize_args(x, dtype, weight.in_features, transform, kInt8Range, weight.groups);
  linear(x, dtype, tokens, quantize, gemm_args(weight, dtype, 0), y, kernels, kernels.int8, pool);
}

void kronecker_quant(const void* x, Dtype dtype, int64_t tokens, int64_t features, const Transform& transform,
                     const float* token_maximum, ActivationRange range, int8_t* q, float* scale, const Kernels& kernels,
                     const Pool& pool) {
  QuantizeArgs args = quantize_args(x, dtype, features, transform, range, 1);
  args.token_maximum = token_maximum;
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
