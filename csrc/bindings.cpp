// SPDX-License-Identifier: Apache-2.0
// torch.ops.vllm_w4a4.* on CPU, through libtorch's stable ABI: one build serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/linear.h"
#include "cpu/silu.h"
#include "cpu/weight_only.h"
#include "tensors.h"

namespace {

using namespace tensors;

int64_t square_size(const Tensor& factor, const char* name) {
  check_float32(factor, name);
  STD_TORCH_CHECK(factor.dim() == 2 && factor.size(0) == factor.size(1) && factor.size(0) > 0, name,
                  ": expected a square matrix, found ", shape_text(factor));
  return factor.size(0);
}

w4a4::Transform make_transform(int64_t features, const OptionalTensor& left_trans, const OptionalTensor& right_trans,
                               const Tensor& clip_ratio) {
  check_float32(clip_ratio, "clip_ratio");
  STD_TORCH_CHECK(clip_ratio.numel() >= 1, "clip_ratio: expected a value, found none");
  const float clip = *static_cast<const float*>(clip_ratio.const_data_ptr());
  STD_TORCH_CHECK(clip > 0.0f && clip <= 1.0f, "clip_ratio: expected a value in (0, 1], found ", clip);
  w4a4::Transform transform{1, features, floats_or_null(left_trans), floats_or_null(right_trans), clip};
  if (left_trans) transform.left = square_size(*left_trans, "left_trans");
  if (right_trans) transform.right = square_size(*right_trans, "right_trans");
  if (left_trans && !right_trans) transform.right = features / transform.left;
  if (right_trans && !left_trans) transform.left = features / transform.right;
  STD_TORCH_CHECK(transform.left * transform.right == features, "left_trans, right_trans: sizes ", transform.left,
                  " x ", transform.right, " do not multiply to the ", features, " input features");
  return transform;
}

// The largest magnitudes of whole tokens, where x has `tokens` parts of them; null if x has whole ones.
const float* maxima_or_null(const OptionalTensor& token_maximum, int64_t tokens) {
  if (!token_maximum) return nullptr;
  check_float32(*token_maximum, "token_maximum");
  STD_TORCH_CHECK(token_maximum->numel() == tokens, "token_maximum: expected one value for each of ", tokens,
                  " tokens, found ", shape_text(*token_maximum));
  return floats_or_null(token_maximum);
}

w4a4::ActivationRange activation_range(int64_t bits) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, "activation_bits: expected 4 or 8, found ", bits);
  return bits == 4 ? w4a4::kInt4Range : w4a4::kInt8Range;
}

w4a4::Weight make_weight(int64_t in_features, const Tensor& packed, int64_t block_bytes, const Tensor& scale,
                         const OptionalTensor& bias, const OptionalTensor& offset) {
  check_contiguous(packed, "weight_packed");
  check_float32(scale, "weight_scale");
  STD_TORCH_CHECK(scale.dim() == 1 || scale.dim() == 2, "weight_scale: expected [out] or [out, groups], found ",
                  shape_text(scale));
  w4a4::Weight weight{};
  weight.in_features = in_features;
  weight.out_features = scale.size(0);
  weight.groups = scale.dim() == 2 ? scale.size(1) : 1;
  STD_TORCH_CHECK(weight.groups > 0 && in_features % weight.groups == 0 &&
                      (weight.groups == 1 || in_features / weight.groups % w4a4::kBlockFeatures == 0),
                  "weight_scale: ", weight.groups, " groups do not divide ", in_features,
                  " input features into multiples of ", w4a4::kBlockFeatures);
  const int64_t tiles = w4a4::tile_count(weight.out_features), blocks = w4a4::block_count(in_features);
  const ScalarType type = packed.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Byte || type == ScalarType::Char) && packed.dim() == 3 &&
                      packed.size(0) == tiles && packed.size(1) == blocks && packed.size(2) == block_bytes,
                  "weight_packed: expected int8 or uint8 [", tiles, ", ", blocks, ", ", block_bytes, "] for ",
                  weight.out_features, " x ", in_features, ", found ", shape_text(packed));
  weight.packed = packed.const_data_ptr();
  weight.scale = static_cast<const float*>(scale.const_data_ptr());
  if (offset) {
    check_float32(*offset, "weight_offset");
    STD_TORCH_CHECK(offset->numel() == scale.numel(), "weight_offset: expected the shape of weight_scale, ",
                    shape_text(scale), ", found ", shape_text(*offset));
    weight.offset = floats_or_null(offset);
  }
  if (bias) {
    check_contiguous(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == weight.out_features, "bias: expected ", weight.out_features, " values, found ",
                    shape_text(*bias));
    weight.bias = bias->const_data_ptr();
    weight.bias_dtype = float_dtype(*bias, "bias");
  }
  return weight;
}

// The shape of x with its last dimension replaced.
std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return shape;
}

int64_t check_tokens(const Tensor& x, const char* name) {
  check_contiguous(x, name);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, name, ": expected [..., in_features], found ",
                  shape_text(x));
  return x.size(x.dim() - 1);
}

// A linear of `features` inputs after `step`.
Tensor linear_after(const w4a4::Step& step, int64_t features, const Tensor& x, const Tensor& packed,
                    const Tensor& weight_scale, const OptionalTensor& left_trans, const OptionalTensor& right_trans,
                    const Tensor& clip_ratio, const OptionalTensor& bias, const OptionalTensor& weight_offset,
                    int64_t activation_bits) {
  const w4a4::Dtype dtype = float_dtype(x, "x");
  const w4a4::Transform transform = make_transform(features, left_trans, right_trans, clip_ratio);
  const w4a4::Weight weight = make_weight(features, packed, w4a4::kBlockBytes, weight_scale, bias, weight_offset);
  Tensor y = new_tensor(x, with_last(x, weight.out_features), x.scalar_type());
  w4a4::flatquant_linear(x.const_data_ptr(), dtype, x.numel() / step.row_features(features), transform,
                         activation_range(activation_bits), weight, y.mutable_data_ptr(), w4a4::kernels(), torch_pool(),
                         step);
  return y;
}

Tensor flatquant_linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                        const OptionalTensor& left_trans, const OptionalTensor& right_trans, const Tensor& clip_ratio,
                        const OptionalTensor& bias, const OptionalTensor& weight_offset, int64_t activation_bits) {
  return linear_after({}, check_tokens(x, "x"), x, packed, weight_scale, left_trans, right_trans, clip_ratio, bias,
                      weight_offset, activation_bits);
}

w4a4::NormArgs norm_args(const Tensor& x, OptionalTensor& residual, const Tensor& weight, double epsilon) {
  w4a4::NormArgs args{};
  args.features = check_tokens(x, "x");
  args.dtype = float_dtype(x, "x");
  args.x = x.const_data_ptr();
  args.epsilon = static_cast<float>(epsilon);
  check_contiguous(weight, "norm_weight");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.numel() == args.features, "norm_weight: expected ",
                  args.features, " values of x's dtype, found ", shape_text(weight));
  args.weight = weight.const_data_ptr();
  if (residual) {
    check_contiguous(*residual, "residual");
    STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type() && residual->numel() == x.numel(),
                    "residual: expected the dtype and shape of x, ", shape_text(x), ", found ", shape_text(*residual));
    args.residual = residual->mutable_data_ptr();
  }
  return args;
}

Tensor rms_norm(const Tensor& x, OptionalTensor residual, const Tensor& weight, double epsilon) {
  const w4a4::NormArgs args = norm_args(x, residual, weight, epsilon);
  Tensor y = new_tensor(x, with_last(x, args.features), x.scalar_type());
  w4a4::rms_norm(args, x.numel() / args.features, y.mutable_data_ptr(), w4a4::kernels(), torch_pool());
  return y;
}

Tensor norm_flatquant_linear(const Tensor& x, OptionalTensor residual, const Tensor& norm_weight, double epsilon,
                             const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& left_trans,
                             const OptionalTensor& right_trans, const Tensor& clip_ratio, const OptionalTensor& bias,
                             const OptionalTensor& weight_offset, int64_t activation_bits) {
  const w4a4::Step step{w4a4::Step::Kind::kNorm, norm_args(x, residual, norm_weight, epsilon)};
  return linear_after(step, step.norm.features, x, packed, weight_scale, left_trans, right_trans, clip_ratio, bias,
                      weight_offset, activation_bits);
}

// Features of silu(gate) * up for x = [gate, up].
int64_t check_gate_up(const Tensor& x) {
  const int64_t both = check_tokens(x, "x");
  STD_TORCH_CHECK(both % 2 == 0, "x: expected gate and up of equal sizes side by side, found ", shape_text(x));
  return both / 2;
}

Tensor silu_flatquant_linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                             const OptionalTensor& left_trans, const OptionalTensor& right_trans,
                             const Tensor& clip_ratio, const OptionalTensor& bias, const OptionalTensor& weight_offset,
                             int64_t activation_bits) {
  return linear_after({w4a4::Step::Kind::kSilu}, check_gate_up(x), x, packed, weight_scale, left_trans, right_trans,
                      clip_ratio, bias, weight_offset, activation_bits);
}

std::tuple<Tensor, Tensor> kronecker_quant(const Tensor& x, const OptionalTensor& left_trans,
                                           const OptionalTensor& right_trans, const Tensor& clip_ratio,
                                           int64_t activation_bits, const OptionalTensor& token_maximum) {
  const int64_t features = check_tokens(x, "x");
  const w4a4::Dtype dtype = float_dtype(x, "x");
  const w4a4::Transform transform = make_transform(features, left_trans, right_trans, clip_ratio);
  const float* maxima = maxima_or_null(token_maximum, x.numel() / features);
  Tensor q = new_tensor(x, with_last(x, features), ScalarType::Char);
  std::vector<int64_t> scale_shape = with_last(x, 0);
  scale_shape.pop_back();
  Tensor scale = new_tensor(x, scale_shape, ScalarType::Float);
  w4a4::kronecker_quant(x.const_data_ptr(), dtype, x.numel() / features, features, transform, maxima,
                        activation_range(activation_bits), static_cast<int8_t*>(q.mutable_data_ptr()),
                        static_cast<float*>(scale.mutable_data_ptr()), w4a4::kernels(), torch_pool());
  return {q, scale};
}

// Tokens that are quantized already; returns the number of their features.
int64_t check_quantized(const Tensor& q, const Tensor& scale) {
  const int64_t features = check_tokens(q, "q");
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Char, "q: expected int8");
  check_float32(scale, "scale");
  STD_TORCH_CHECK(scale.numel() * features == q.numel(), "scale: expected one value per token of q, found ",
                  scale.numel());
  return features;
}

Tensor int4_linear(const Tensor& q, const Tensor& scale, const Tensor& packed, const Tensor& weight_scale,
                   const OptionalTensor& bias, const OptionalTensor& weight_offset, ScalarType out_dtype,
                   int64_t activation_bits) {
  const int64_t features = check_quantized(q, scale);
  const w4a4::Weight weight = make_weight(features, packed, w4a4::kBlockBytes, weight_scale, bias, weight_offset);
  Tensor y = new_tensor(q, with_last(q, weight.out_features), out_dtype);
  w4a4::int4_linear(static_cast<const int8_t*>(q.const_data_ptr()), static_cast<const float*>(scale.const_data_ptr()),
                    q.numel() / features, activation_range(activation_bits), weight, y.mutable_data_ptr(),
                    float_dtype(y, "out_dtype"), w4a4::kernels(), torch_pool());
  return y;
}

w4a4::Weight make_int8_weight(int64_t features, const Tensor& packed, const Tensor& weight_scale,
                              const OptionalTensor& bias) {
  const w4a4::Weight weight = make_weight(features, packed, w4a4::kInt8BlockBytes, weight_scale, bias, std::nullopt);
  STD_TORCH_CHECK(weight.groups == 1, "weight_scale: expected one value per output feature, found ", weight.groups);
  return weight;
}

Tensor int8_linear(const Tensor& q, const Tensor& scale, const Tensor& packed, const Tensor& weight_scale,
                   const OptionalTensor& bias, const OptionalTensor& quant_bias, ScalarType out_dtype) {
  const int64_t features = check_quantized(q, scale);
  w4a4::Weight weight = make_int8_weight(features, packed, weight_scale, bias);
  if (quant_bias) {
    check_contiguous(*quant_bias, "quant_bias");
    STD_TORCH_CHECK(quant_bias->scalar_type() == ScalarType::Int && quant_bias->numel() == weight.out_features,
                    "quant_bias: expected int32 [", weight.out_features, "], found ", shape_text(*quant_bias));
    weight.quant_bias = static_cast<const int32_t*>(quant_bias->const_data_ptr());
  }
  Tensor y = new_tensor(q, with_last(q, weight.out_features), out_dtype);
  w4a4::int8_linear(static_cast<const int8_t*>(q.const_data_ptr()), static_cast<const float*>(scale.const_data_ptr()),
                    q.numel() / features, weight, y.mutable_data_ptr(), float_dtype(y, "out_dtype"), w4a4::kernels(),
                    torch_pool());
  return y;
}

Tensor weight_only_linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias,
                          const OptionalTensor& weight_offset) {
  const int64_t features = check_tokens(x, "x");
  const w4a4::Dtype dtype = float_dtype(x, "x");
  const bool is_int4 = packed.dim() == 3 && packed.size(2) == w4a4::kBlockBytes;
  const w4a4::Weight weight = make_weight(features, packed, is_int4 ? w4a4::kBlockBytes : w4a4::kInt8BlockBytes,
                                          weight_scale, bias, weight_offset);
  Tensor y = new_tensor(x, with_last(x, weight.out_features), x.scalar_type());
  w4a4::weight_only_linear(x.const_data_ptr(), dtype, x.numel() / features, weight, is_int4, y.mutable_data_ptr(),
                           w4a4::kernels(), torch_pool());
  return y;
}

Tensor w8a8_linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias,
                   const OptionalTensor& left_trans, const OptionalTensor& right_trans,
                   const OptionalTensor& clip_ratio) {
  const int64_t features = check_tokens(x, "x");
  const w4a4::Dtype dtype = float_dtype(x, "x");
  const w4a4::Weight weight = make_int8_weight(features, packed, weight_scale, bias);
  const w4a4::Transform transform = clip_ratio ? make_transform(features, left_trans, right_trans, *clip_ratio)
                                               : w4a4::Transform{1, features, nullptr, nullptr, 1.0f};
  Tensor y = new_tensor(x, with_last(x, weight.out_features), x.scalar_type());
  w4a4::w8a8_linear(x.const_data_ptr(), dtype, x.numel() / features, transform, weight, y.mutable_data_ptr(),
                    w4a4::kernels(), torch_pool());
  return y;
}

Tensor silu_and_mul(const Tensor& x) {
  const int64_t features = check_gate_up(x);
  const w4a4::Dtype dtype = float_dtype(x, "x");
  Tensor y = new_tensor(x, with_last(x, features), x.scalar_type());
  w4a4::silu_and_mul(x.const_data_ptr(), dtype, x.numel() / (2 * features), features, y.mutable_data_ptr(),
                     w4a4::kernels(), torch_pool());
  return y;
}

std::string cpu_instruction_set() { return w4a4::kernels().name; }

// Comma-separated, best first.
std::string cpu_available_instruction_sets() {
  std::string text;
  for (const w4a4::Kernels* candidate : w4a4::all_kernels()) {
    if (candidate->is_available()) text += (text.empty() ? "" : ",") + std::string(candidate->name);
  }
  return text;
}

std::vector<int64_t> int4_layout() { return {w4a4::kTileRows, w4a4::kBlockFeatures, w4a4::kBlockBytes}; }

}  // namespace

STABLE_TORCH_LIBRARY(vllm_w4a4, m) {
  m.def(
      "flatquant_linear(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? left_trans, Tensor? right_trans, "
      "Tensor clip_ratio, Tensor? bias=None, Tensor? weight_offset=None, int activation_bits=4) -> Tensor");
  m.def(
      "norm_flatquant_linear(Tensor x, Tensor(a!)? residual, Tensor norm_weight, float epsilon, Tensor weight_packed, "
      "Tensor weight_scale, Tensor? left_trans, Tensor? right_trans, Tensor clip_ratio, Tensor? bias=None, "
      "Tensor? weight_offset=None, int activation_bits=4) -> Tensor");
  m.def(
      "silu_flatquant_linear(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? left_trans, "
      "Tensor? right_trans, Tensor clip_ratio, Tensor? bias=None, Tensor? weight_offset=None, int activation_bits=4) "
      "-> Tensor");
  m.def("rms_norm(Tensor x, Tensor(a!)? residual, Tensor norm_weight, float epsilon) -> Tensor");
  m.def(
      "kronecker_quant(Tensor x, Tensor? left_trans, Tensor? right_trans, Tensor clip_ratio, int activation_bits=4, "
      "Tensor? token_maximum=None) -> (Tensor, Tensor)");
  m.def(
      "int4_linear(Tensor q, Tensor scale, Tensor weight_packed, Tensor weight_scale, Tensor? bias, "
      "Tensor? weight_offset, ScalarType out_dtype, int activation_bits=4) -> Tensor");
  m.def(
      "int8_linear(Tensor q, Tensor scale, Tensor weight_packed, Tensor weight_scale, Tensor? bias, "
      "Tensor? quant_bias, ScalarType out_dtype) -> Tensor");
  m.def(
      "weight_only_linear(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? bias=None, "
      "Tensor? weight_offset=None) -> Tensor");
  m.def("silu_and_mul(Tensor x) -> Tensor");
  m.def(
      "w8a8_linear(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? bias=None, Tensor? left_trans=None, "
      "Tensor? right_trans=None, Tensor? clip_ratio=None) -> Tensor");
  m.def("cpu_instruction_set() -> str");
  m.def("cpu_available_instruction_sets() -> str");
  m.def("int4_layout() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_w4a4, CPU, m) {
  m.impl("flatquant_linear", TORCH_BOX(&flatquant_linear));
  m.impl("norm_flatquant_linear", TORCH_BOX(&norm_flatquant_linear));
  m.impl("silu_flatquant_linear", TORCH_BOX(&silu_flatquant_linear));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("kronecker_quant", TORCH_BOX(&kronecker_quant));
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("weight_only_linear", TORCH_BOX(&weight_only_linear));
  m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul));
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_w4a4, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
  m.impl("cpu_available_instruction_sets", TORCH_BOX(&cpu_available_instruction_sets));
  m.impl("int4_layout", TORCH_BOX(&int4_layout));
}
