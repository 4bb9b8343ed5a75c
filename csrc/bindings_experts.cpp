// SPDX-License-Identifier: Apache-2.0
// torch.ops.vllm_w4a4.experts_mlp on CPU; see bindings.cpp.
#include <string>
#include <vector>

#include "cpu/experts.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "tensors.h"

namespace {

using namespace tensors;

// A message's name of an argument of one of the two products.
std::string name_of(const char* product, const char* argument) { return std::string(product) + "_" + argument; }

const float* expert_floats(const OptionalTensor& tensor, int64_t count, const std::string& name) {
  if (!tensor.has_value()) return nullptr;
  check_float32(*tensor, name.c_str());
  STD_TORCH_CHECK(tensor->numel() == count, name, ": expected ", count, " values, found ", shape_text(*tensor));
  return floats_or_null(tensor);
}

w4a4::ExpertWeights make_weights(const char* product, int64_t in_features, const Tensor& packed, const Tensor& scale,
                                 const OptionalTensor& offset, const OptionalTensor& bias) {
  const std::string packed_name = name_of(product, "packed"), scale_name = name_of(product, "scale");
  check_contiguous(packed, packed_name.c_str());
  check_float32(scale, scale_name.c_str());
  STD_TORCH_CHECK(scale.dim() == 2 || scale.dim() == 3, scale_name,
                  ": expected [experts, out] or [experts, out, groups], found ", shape_text(scale));
  w4a4::ExpertWeights weights{};
  weights.in_features = in_features;
  weights.experts = scale.size(0);
  weights.out_features = scale.size(1);
  weights.groups = scale.dim() == 3 ? scale.size(2) : 1;
  STD_TORCH_CHECK(weights.experts > 0 && weights.out_features > 0, scale_name,
                  ": expected experts with features, found ", shape_text(scale));
  STD_TORCH_CHECK(weights.groups > 0 && in_features % weights.groups == 0 &&
                      (weights.groups == 1 || in_features / weights.groups % w4a4::kBlockFeatures == 0),
                  scale_name, ": ", weights.groups, " groups do not divide ", in_features,
                  " input features into multiples of ", w4a4::kBlockFeatures);
  const int64_t tiles = w4a4::tile_count(weights.out_features), blocks = w4a4::block_count(in_features);
  const ScalarType type = packed.scalar_type();
  weights.block_bytes = packed.dim() == 4 ? packed.size(3) : 0;
  STD_TORCH_CHECK((type == ScalarType::Byte || type == ScalarType::Char) && packed.dim() == 4 &&
                      packed.size(0) == weights.experts && packed.size(1) == tiles && packed.size(2) == blocks &&
                      (weights.block_bytes == w4a4::kBlockBytes || weights.block_bytes == w4a4::kInt8BlockBytes),
                  packed_name, ": expected int8 or uint8 [", weights.experts, ", ", tiles, ", ", blocks, ", ",
                  w4a4::kBlockBytes, " for int4 or ", w4a4::kInt8BlockBytes, " for int8] for ", weights.experts,
                  " experts of ", weights.out_features, " x ", in_features, ", found ", shape_text(packed));
  weights.packed = packed.const_data_ptr();
  weights.scale = static_cast<const float*>(scale.const_data_ptr());
  weights.offset = expert_floats(offset, scale.numel(), name_of(product, "offset"));
  weights.bias = expert_floats(bias, weights.experts * weights.out_features, name_of(product, "bias"));
  return weights;
}

// A factor [size, size], or one for each of `experts`.
struct Factor {
  const float* values;
  int64_t size, count;
};

Factor make_factor(const OptionalTensor& factor, int64_t experts, const std::string& name) {
  if (!factor.has_value()) return {nullptr, 0, 1};
  check_float32(*factor, name.c_str());
  const int64_t dim = factor->dim();
  STD_TORCH_CHECK((dim == 2 || dim == 3) && factor->size(dim - 1) == factor->size(dim - 2) && factor->size(dim - 1) > 0,
                  name, ": expected square matrices, found ", shape_text(*factor));
  const int64_t count = dim == 3 ? factor->size(0) : 1;
  STD_TORCH_CHECK(count == 1 || count == experts, name, ": expected one matrix or one for each of ", experts,
                  " experts, found ", shape_text(*factor));
  return {floats_or_null(factor), factor->size(dim - 1), count};
}

w4a4::ExpertTransform make_transform(const char* product, int64_t features, int64_t experts,
                                     const OptionalTensor& left_trans, const OptionalTensor& right_trans,
                                     const Tensor& clip_ratio) {
  const Factor left = make_factor(left_trans, experts, name_of(product, "left_trans"));
  const Factor right = make_factor(right_trans, experts, name_of(product, "right_trans"));
  const std::string clip_name = name_of(product, "clip_ratio");
  check_float32(clip_ratio, clip_name.c_str());
  const int64_t clips = clip_ratio.numel();
  STD_TORCH_CHECK(clips == 1 || clips == experts, clip_name, ": expected one value or one for each of ", experts,
                  " experts, found ", shape_text(clip_ratio));
  const auto* clip = static_cast<const float*>(clip_ratio.const_data_ptr());
  for (int64_t i = 0; i < clips; ++i) {
    STD_TORCH_CHECK(clip[i] > 0.0f && clip[i] <= 1.0f, clip_name, ": expected values in (0, 1], found ", clip[i]);
  }
  int64_t rows = left.size, columns = right.size;
  if (rows == 0) rows = columns == 0 ? 1 : features / columns;
  if (columns == 0) columns = features / rows;
  STD_TORCH_CHECK(rows * columns == features, product, "_left_trans, ", product, "_right_trans: sizes ", rows, " x ",
                  columns, " do not multiply to the ", features, " input features");
  return {rows, columns, left.values, right.values, clip, left.count, right.count, clips};
}

template <class Id>
void append_local(const void* ids, int64_t count, const int32_t* expert_map, int64_t known, std::vector<int32_t>& to) {
  const auto* values = static_cast<const Id*>(ids);
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(values[i] >= -1 && values[i] < known, "topk_ids: expected ids in [-1, ", known, "), found ",
                    values[i]);
    to.push_back(expert_map == nullptr || values[i] < 0 ? static_cast<int32_t>(values[i]) : expert_map[values[i]]);
  }
}

// The places of the chosen experts among those of this rank, negative for the others.
std::vector<int32_t> local_experts(const Tensor& ids, const OptionalTensor& expert_map, int64_t experts) {
  check_contiguous(ids, "topk_ids");
  const int32_t* map = nullptr;
  int64_t known = experts;
  if (expert_map.has_value()) {
    check_contiguous(*expert_map, "expert_map");
    STD_TORCH_CHECK(expert_map->scalar_type() == ScalarType::Int, "expert_map: expected int32");
    map = static_cast<const int32_t*>(expert_map->const_data_ptr());
    known = expert_map->numel();
    for (int64_t i = 0; i < known; ++i) {
      STD_TORCH_CHECK(map[i] < experts, "expert_map: expected places of the ", experts, " experts, found ", map[i]);
    }
  }
  std::vector<int32_t> local;
  local.reserve(ids.numel());
  const bool is_int = ids.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(is_int || ids.scalar_type() == ScalarType::Long, "topk_ids: expected int32 or int64");
  const auto append = is_int ? append_local<int32_t> : append_local<int64_t>;
  append(ids.const_data_ptr(), ids.numel(), map, known, local);
  return local;
}

Tensor experts_mlp(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids, const Tensor& w13_packed,
                   const Tensor& w13_scale, const Tensor& w2_packed, const Tensor& w2_scale,
                   const OptionalTensor& w13_offset, const OptionalTensor& w2_offset, const OptionalTensor& w13_bias,
                   const OptionalTensor& w2_bias, const OptionalTensor& w13_left_trans,
                   const OptionalTensor& w13_right_trans, const Tensor& w13_clip_ratio,
                   const OptionalTensor& w2_left_trans, const OptionalTensor& w2_right_trans,
                   const Tensor& w2_clip_ratio, const OptionalTensor& expert_map, int64_t activation_bits,
                   bool is_double) {
  check_contiguous(x, "x");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "x: expected [tokens, hidden], found ", shape_text(x));
  const w4a4::Dtype dtype = float_dtype(x, "x");
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check_float32(topk_weights, "topk_weights");
  STD_TORCH_CHECK(topk_weights.dim() == 2 && topk_weights.size(0) == tokens && topk_weights.size(1) > 0,
                  "topk_weights: expected [", tokens, ", top_k], found ", shape_text(topk_weights));
  STD_TORCH_CHECK(topk_ids.dim() == 2 && topk_ids.size(0) == tokens && topk_ids.size(1) == topk_weights.size(1),
                  "topk_ids: expected the shape of topk_weights, ", shape_text(topk_weights), ", found ",
                  shape_text(topk_ids));
  STD_TORCH_CHECK(activation_bits == 4 || activation_bits == 8, "activation_bits: expected 4 or 8, found ",
                  activation_bits);
  w4a4::ExpertWeights w13 = make_weights("w13", hidden, w13_packed, w13_scale, w13_offset, w13_bias);
  STD_TORCH_CHECK(w13.out_features % 2 == 0, "w13_scale: expected the rows of gate and up, found ",
                  shape_text(w13_scale));
  const int64_t intermediate = w13.out_features / 2;
  w4a4::ExpertWeights w2 = make_weights("w2", intermediate, w2_packed, w2_scale, w2_offset, w2_bias);
  w13.wide_activations = w2.wide_activations = activation_bits == 8;
  STD_TORCH_CHECK(w2.experts == w13.experts && w2.out_features == hidden, "w2_scale: expected ", w13.experts,
                  " experts with ", hidden, " output features, found ", shape_text(w2_scale));
  // The input is transformed once for all experts.
  const w4a4::ExpertTransform w13_transform =
      make_transform("w13", hidden, 1, w13_left_trans, w13_right_trans, w13_clip_ratio);
  const w4a4::ExpertTransform w2_transform =
      make_transform("w2", intermediate, w2.experts, w2_left_trans, w2_right_trans, w2_clip_ratio);
  const std::vector<int32_t> experts = local_experts(topk_ids, expert_map, w13.experts);
  const w4a4::Routing routing{static_cast<const float*>(topk_weights.const_data_ptr()), experts.data(),
                              topk_weights.size(1)};
  Tensor y = torch::stable::new_empty(x, {tokens, hidden}, is_double ? ScalarType::Double : x.scalar_type());
  w4a4::experts_mlp(x.const_data_ptr(), dtype, tokens, routing, w13_transform, w13, w2_transform, w2,
                    y.mutable_data_ptr(), is_double, w4a4::kernels(), torch_pool());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_w4a4, m) {
  m.def(
      "experts_mlp(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w13_packed, Tensor w13_scale, "
      "Tensor w2_packed, Tensor w2_scale, Tensor? w13_offset, Tensor? w2_offset, Tensor? w13_bias, Tensor? w2_bias, "
      "Tensor? w13_left_trans, Tensor? w13_right_trans, Tensor w13_clip_ratio, Tensor? w2_left_trans, "
      "Tensor? w2_right_trans, Tensor w2_clip_ratio, Tensor? expert_map, int activation_bits=4, "
      "bool is_double=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_w4a4, CPU, m) { m.impl("experts_mlp", TORCH_BOX(&experts_mlp)); }
