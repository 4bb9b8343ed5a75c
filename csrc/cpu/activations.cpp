// SPDX-License-Identifier: Apache-2.0
#include "activations.h"

#include <algorithm>
#include <cstring>

#include "layout.h"
#include "scratch.h"

namespace w4a4 {
namespace {

thread_local Scratch right_scratch, token_scratch, shared_scratch, maximum_scratch, row_scratch, norm_scratch_floats;

// What `step` makes of token `token`, [features] of the tokens' type.
void take_step(const Step& step, const QuantizeArgs& args, int64_t token, const Kernels& kernels, void* row) {
  if (step.kind == Step::Kind::kNorm) {
    kernels.rms_norm(step.norm, token, norm_scratch_floats.get<float>(norm_scratch(args.features)), row);
  } else {
    const int64_t bytes = args.features * dtype_size(args.dtype);
    const char* gate = static_cast<const char*>(args.x) + 2 * token * bytes;
    kernels.silu_and_mul_of(gate, gate + bytes, args.dtype, args.features, row);
  }
}

// Quantizes one or a few tokens with every thread at work on each. Through both products of a transform a thread keeps
// to columns of its own: nothing but the token itself and a quarter of the result, for two threads, moves between
// cores.
void quantize_by_parts(const QuantizeArgs& args, int64_t tokens, const Kernels& kernels, const Pool& pool) {
  const int64_t size = args.left * args.padded_right, units = args.padded_right / kTransformPadding;
  float* z = shared_scratch.get<float>(tokens * size);
  struct alignas(64) Maximum {
    int32_t bits;
  };
  const auto for_parts = [&](int64_t parts, const auto& body) {
    pool.parallel_for(tokens * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) body(item / parts, item % parts);
    });
  };
  const int64_t most = ceil_div(pool.threads, tokens), column_parts = std::min(most, units);
  Maximum* largest = maximum_scratch.get<Maximum>(tokens * column_parts);
  for_parts(column_parts, [&](int64_t token, int64_t part) {
    largest[token * column_parts + part].bits =
        kernels.transform_columns(args, token, part * units / column_parts * kTransformPadding,
                                  (part + 1) * units / column_parts * kTransformPadding,
                                  token_scratch.get<float>(transform_scratch(args)), z + token * size);
  });
  const int64_t row_parts = std::min(most, args.left);
  for_parts(row_parts, [&](int64_t token, int64_t part) {
    int32_t of_token = 0;
    for (int64_t p = 0; p < column_parts; ++p) of_token = std::max(of_token, largest[token * column_parts + p].bits);
    kernels.quantize_rows(args, token, part * args.left / row_parts, (part + 1) * args.left / row_parts, of_token,
                          z + token * size);
  });
  for (int64_t token = 0; token < tokens; ++token) kernels.sum_groups(args, token);
}

struct TileRow {
  uint8_t bytes[kTokenAlignment];
};

// The tokens at `rows`, `size` of them, as one panel with units of type Unit.
template <class Unit>
void write_panel(const int8_t* const* rows, int64_t stride, int64_t size, int8_t* panel) {
  constexpr int64_t kUnit = sizeof(Unit);
  for (int64_t k = 0; k < stride; k += kUnit) {
    for (int64_t t = 0; t < size; ++t, panel += kUnit) std::memcpy(panel, rows[t] + k, kUnit);
  }
}

}  // namespace

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
  args.right_trans = transform.right_trans;
  if (transform.right_trans != nullptr && args.padded_right != transform.right) {
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

void quantize_tokens(const QuantizeArgs& args, int64_t tokens, const Kernels& kernels, const Pool& pool,
                     const Step& step) {
  const bool transforms = args.left_trans != nullptr || args.right_trans != nullptr;
  // Without a transform a value costs about as much as 16 multiplications.
  const int64_t token_cost = args.features * (transforms ? args.left + args.right : 16);
  if (transforms && tokens < pool.threads && token_cost >= kQuantizeGrain) {
    QuantizeArgs whole = args;
    if (step.kind != Step::Kind::kNone) {
      const int64_t bytes = args.features * dtype_size(args.dtype);
      char* rows = row_scratch.get<char>(tokens * bytes);
      for (int64_t token = 0; token < tokens; ++token) take_step(step, args, token, kernels, rows + token * bytes);
      whole.x = rows;
    }
    return quantize_by_parts(whole, tokens, kernels, pool);
  }
  pool.parallel_for(tokens, std::max<int64_t>(1, kQuantizeGrain / token_cost),
                    [&](int64_t begin, int64_t end) { quantize_here(args, begin, end, kernels, step); });
}

void quantize_here(const QuantizeArgs& args, int64_t begin, int64_t end, const Kernels& kernels, const Step& step) {
  float* scratch = token_scratch.get<float>(transform_scratch(args));
  if (step.kind == Step::Kind::kNone) return kernels.quantize(args, begin, end, scratch);
  char* row = row_scratch.get<char>(args.features * dtype_size(args.dtype));
  for (int64_t token = begin; token < end; ++token) {
    take_step(step, args, token, kernels, row);
    QuantizeArgs one = args;
    one.x = row;
    one.q += token * args.q_stride;
    one.scale += token;
    if (args.q_sums != nullptr) one.q_sums += token * args.groups;
    if (args.token_maximum != nullptr) one.token_maximum += token;
    kernels.quantize(one, 0, 1, scratch);
  }
}

void make_panel(const int8_t* q, int64_t stride, const int32_t* rows, const Panels& panels, int64_t panel,
                const Gemm& gemm, int8_t* target) {
  const int64_t begin = panels.begin(panel), size = panels.size(panel);
  const int8_t* tokens[kMaxGemmTokens];
  for (int64_t t = 0; t < size; ++t) tokens[t] = q + (rows != nullptr ? rows[begin + t] : begin + t) * stride;
  target += begin * stride;
  if (gemm.panel_unit == sizeof(TileRow)) {
    write_panel<TileRow>(tokens, stride, size, target);
  } else if (gemm.panel_unit == sizeof(uint64_t)) {
    write_panel<uint64_t>(tokens, stride, size, target);
  } else {
    write_panel<uint32_t>(tokens, stride, size, target);
  }
}

}  // namespace w4a4
