// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 4
#include "weight_only.h"

#include <algorithm>
#include <vector>

#include "layout.h"
#include "vector.h"

namespace w4a4 {
namespace {

const float* as_floats(const void* values, Dtype dtype, int64_t count, std::vector<float>& scratch) {
  if (values == nullptr || dtype == Dtype::kFloat32) return static_cast<const float*>(values);
  if (static_cast<int64_t>(scratch.size()) < count) scratch.resize(count);
  load_floats(values, dtype, count, scratch.data());
  return scratch.data();
}

}  // namespace

void weight_only_linear(const void* x, Dtype dtype, int64_t tokens, const Weight& weight, bool is_int4, void* y,
                        const Kernels& kernels, const Pool& pool) {
  thread_local std::vector<float> x_scratch, bias_scratch;  // kept from call to call
  WeightOnlyArgs args{};
  args.is_int4 = is_int4;
  args.packed = weight.packed;
  args.weight_scale = weight.scale;
  args.weight_offset = weight.offset;
  args.bias = as_floats(weight.bias, weight.bias_dtype, weight.out_features, bias_scratch);
  args.in_features = weight.in_features;
  args.out_features = weight.out_features;
  args.groups = weight.groups;
  args.dtype = dtype;
  for (int64_t begin = 0; begin < tokens; begin += kWeightOnlyTokens) {
    args.tokens = std::min(kWeightOnlyTokens, tokens - begin);
    const void* source = static_cast<const char*>(x) + begin * weight.in_features * dtype_size(dtype);
    args.x = as_floats(source, dtype, args.tokens * weight.in_features, x_scratch);
    args.y = static_cast<char*>(y) + begin * weight.out_features * dtype_size(dtype);
    for_tiles(tile_count(weight.out_features), pool,
              [&](int64_t first, int64_t last) { kernels.weight_only(args, first, last); });
  }
}

}  // namespace w4a4
